"""Configuration files: checked keys, types and values; damaged and hostile ones are refused in one line, at once."""
from __future__ import annotations

import argparse
import math
import os
import random
import re
import time
from dataclasses import fields, is_dataclass

import pytest
import yaml

from ip_adapter.cli.inference import inference_parser
from ip_adapter.cli.parser import number_of
from ip_adapter.cli.training import TRAINING, training_parser
from ip_adapter.config import (
    ROOT,
    InferenceConfig,
    ModelConfig,
    SamplingConfig,
    TrainingConfig,
    load_config,
)
from ldm.errors import UserError

CONFIGS = sorted((ROOT / "configs").glob("*/*.yaml"))


def schema_of(path) -> type:
    """What a shipped file configures."""
    return TrainingConfig if path.parent.name == "training" else InferenceConfig


def refused(path, schema: type = InferenceConfig) -> str:
    """The one line that refuses a file, within a second."""
    begun = time.perf_counter()
    with pytest.raises(UserError) as error:
        load_config(schema, path)
    assert time.perf_counter() - begun < 1 and "\n" not in str(error.value) and str(error.value).isprintable()
    return str(error.value)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "inference").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_file_is_valid(path):
    assert isinstance(load_config(InferenceConfig, path), InferenceConfig)


@pytest.mark.parametrize("text, message", [
    ("sampling:\n  stps: 3", "stps"), ("sampling:\n  H: tall", "sampling.H"), ("name: [1, 2", "not valid YAML"),
    ("- 1\n- 2", "c.yaml"), (None, "no such file"), ("model: other.yaml", "other.yaml: no such file"),
    ("model:\n  heads: 3", "heads"),
    ("model:\n  image_activation: relu", "image_activation is 'relu', expected gelu, quick_gelu or ''"),
    ("model:\n  num_heads: 0", "model.num_heads is 0, expected -1 or 1 to 1024"),
    ("model:\n  norm_groups: -4", "model.norm_groups is -4"), ("model:\n  scale_factor: .nan", "scale_factor is nan"),
    ("model:\n  beta_end: 0.0001", "model.beta_start is 0.00085, expected at most model.beta_end, which is 0.0001"),
    ("model:\n  prediction: x", "model.prediction is 'x', expected eps or v"),
    ("sampling:\n  H: 0", "sampling.H is 0, expected 8 to 4096, a multiple of 8"),
    ("sampling:\n  W: 100", "sampling.W is 100, expected 8 to 4096, a multiple of 8"),
    ("sampling:\n  n_samples: 0", "sampling.n_samples is 0"), ("sampling:\n  scale: .inf", "sampling.scale is inf"),
    ("sampling:\n  sampling_steps: -5", "sampling_steps is -5"), ("sampling:\n  sampler: x", "sampler is 'x'"),
    ("name: ${oc.env:HOME}", r"line 1 holds \$\{\.\.\.\}"), ("img: a\n${b}: c", r"line 2 holds \$\{"),
    ("a: &x [1]\nb: *x", r"line 2 holds an alias, \*x"), ("name: " + "[" * 20000, "nested more than 8 levels"),
    ("name: " + "{a: " * 1000, "nested more than 8 levels"), ("#" * 40000, "is larger than 32768 bytes"),
    ("name: caf\xe9", "is not UTF-8 text"), ('name: "\\ud800"', "half a character"), ('name: "a\\0"', "a NUL"),
    ("model: c.yaml", "names another file"), ("model: ''", "is a folder"), ("a: 1\n? [b]\n: 2", "c.yaml"),
    ("seed: " + "9" * 5000, "c.yaml")])
def test_mistakes_are_named(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    assert re.search(message, refused(path))


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "training").glob("*.yaml")), ids=lambda path: path.name)
def test_every_training_is_of_a_model_for_inference(path):
    models = [load_config(InferenceConfig, other).model for other in (ROOT / "configs" / "inference").glob("*.yaml")]
    assert load_config(TrainingConfig, path).model in models


def test_a_model_named_by_its_file(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "m.yaml").write_text("model:\n  num_heads: 3\n  prediction: v\n")
    (tmp_path / "sub" / "c.yaml").write_text("model: ../m.yaml\nseed: 5\n")
    config = load_config(TrainingConfig, tmp_path / "sub" / "c.yaml")
    assert config.model == ModelConfig(num_heads=3, prediction="v") and config.seed == 5


def test_what_is_no_yaml_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, message in ((tmp_path / "pipe", "is not a regular file"), (tmp_path, "is a folder"),
                          ("/dev/zero", "is not a regular file"), ("", "is empty"),
                          (tmp_path / ("x" * 300), "too long"),
                          (tmp_path / "a\0b", "null byte"), (ROOT / "assets" / "demo.png", "larger|UTF-8")):
        assert re.search(message, refused(path))
    (tmp_path / "c.yaml").write_bytes("name: x".encode("utf-16"))
    assert "is not UTF-8 text" in refused(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_bytes(b"\xef\xbb\xbfname: x")  # as Windows' editors save it
    assert load_config(InferenceConfig, tmp_path / "c.yaml").name == "x"


def test_laughs_are_not_multiplied(tmp_path):
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    (tmp_path / "c.yaml").write_text("\n".join(lines))
    assert "line 2 holds an alias" in refused(tmp_path / "c.yaml")


@pytest.mark.parametrize("schema", [ModelConfig, SamplingConfig, TrainingConfig])
def test_every_number_has_limits_that_hold_its_default(schema):
    for setting in fields(schema):
        if type(setting.default) in (int, float):
            assert setting.metadata["limits"].allow(setting.default), setting.name


def test_flags_and_files_have_the_same_limits(tmp_path):
    """Of every number that is both: the values at its limits are taken by both, those beyond by neither."""
    parsers = {SamplingConfig: inference_parser("", "1.5", InferenceConfig()),
               TrainingConfig: training_parser("", "1.5", TrainingConfig(), TRAINING["SD-1.5"])}
    path, seen = tmp_path / "c.yaml", 0
    for schema, parser in parsers.items():
        actions = {action.dest: action for action in parser._actions}
        for setting in fields(schema):
            if "limits" not in setting.metadata:
                continue
            low, high, step, _ = setting.metadata["limits"]
            beyond = step if isinstance(setting.default, int) else 1e-7
            for value, fine in ((low, True), (high, True), (low - beyond, False), (high + 2 * max(1, beyond), False),
                                (low + 1, step == 1 and low + 1 <= high), (math.nan, False), (math.inf, False)):
                value = value if isinstance(setting.default, float) or not math.isfinite(value) else int(value)
                path.write_text(yaml.safe_dump({setting.name: value} if schema is TrainingConfig else
                                               {"sampling": {setting.name: value}}))
                results = []
                for attempt in (lambda: actions[setting.name].type(str(value)),
                                lambda: number_of(schema, setting.name)(str(value)),
                                lambda: load_config(TrainingConfig if schema is TrainingConfig else InferenceConfig,
                                                    path)):
                    try:
                        results.append(bool(attempt()) or True)
                    except (UserError, argparse.ArgumentTypeError):
                        results.append(False)
                assert results == [fine] * 3, (setting.name, value)
                seen += 1
    assert seen == 7 * (9 + 28)


VALUES = [0, -1, 1, 7, 0.5, math.nan, math.inf, -math.inf, 1e30, -1e30, 10**400, "", "x", "1", "???", "${a}", "\n",
          "a\tb", [], {}, None, True, [1] * 500, {"a": {"b": 1}}, [[]], "x" * 5000, "\x85", "2020-99-99", b"\xff"]


def valid(config) -> None:
    """Every value has the type of its field and is within its limits."""
    for setting in fields(config):
        value = getattr(config, setting.name)
        if is_dataclass(value):
            valid(value)
            continue
        assert isinstance(value, tuple) if setting.name == "ckpt_path" else type(value) is type(setting.default)
        if type(value) in (int, float):
            assert setting.metadata["limits"].allow(value), setting.name
        if "words" in setting.metadata:
            assert value in setting.metadata["words"]


def mutated_text(path, rng: random.Random) -> bytes:
    """A shipped file with a value replaced, keys dropped, added or renamed, bytes changed, or its end cut off."""
    content = path.read_bytes()
    kind = rng.randrange(6)
    if kind == 0:
        return content[: rng.randrange(len(content))]
    if kind == 1:
        bad = bytearray(content)
        for _ in range(rng.randint(1, 6)):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        return bytes(bad)
    if kind == 2:  # in the text itself, whose values are then spelled in every way
        lines = content.decode().splitlines()
        at = rng.choice([n for n, line in enumerate(lines) if ": " in line and not line.startswith("#")])
        lines[at] = lines[at].split(": ")[0] + ": " + rng.choice(
            ["", "~", "nan", ".nan", "1e30", "0x10", "1_0", "1:30", "!!int x", "!!float inf", "!!python/none", "&a 1",
             "*a", "|", ">-", "- 1", "'", '"', "{", "[", "@", "`", "%", "9" * 5000, "yes", "2020-99-99", "!!binary x"])
        return "\n".join(lines).encode()
    tree = yaml.safe_load(content)
    block = rng.choice([tree, *(value for value in tree.values() if isinstance(value, dict))])
    key = rng.choice(list(block))
    if kind == 3:
        block.pop(key)
        block[rng.choice(["unknown", key + "_", "", "${a}", 1, None, True, 0.5, "a.b"])] = 1
    elif kind == 4:
        for schema in (ModelConfig, SamplingConfig, TrainingConfig):
            for setting in rng.sample(fields(schema), 3):
                block[setting.name] = rng.choice(VALUES)
    else:
        block[key] = rng.choice(VALUES)
    return yaml.safe_dump(tree, allow_unicode=True).encode()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_damaged_file_is_valid_or_refused(tmp_path, path):
    """Also as seen by the parsers, whose defaults it holds: nothing but one line, within a second each."""
    rng, taken, broken = random.Random(path.name), 0, tmp_path / "training" / "c.yaml"
    broken.parent.mkdir()
    (tmp_path / "inference").symlink_to(ROOT / "configs" / "inference")
    for _ in range(150):
        broken.write_bytes(mutated_text(path, rng))
        begun = time.perf_counter()
        try:
            config = load_config(schema_of(path), broken)
        except UserError as error:
            assert "\n" not in str(error) and str(error).isprintable()
            assert str(broken.parent) in str(error)
        else:
            valid(config)
            taken += 1
        assert time.perf_counter() - begun < 1
    assert 5 < taken < 120
