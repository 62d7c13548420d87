"""Training flags: settings of no effect and folders in use are found before MindSpore is imported."""
from __future__ import annotations

import argparse
import runpy
import subprocess
import sys
from dataclasses import fields

import pytest

import train_sd
import train_sdxl
from ip_adapter.cli.training import IDLE, TRAINING_DEMO, check_idle
from ip_adapter.config import STATE, TrainingConfig
from ip_adapter.training.plan import plan, state_to_resume
from ldm.errors import UserError
from tests.support.scripts import ROOT
from tests.support.training import flags

TRAIN_DEMO = runpy.run_path(str(ROOT / "tools" / "train_demo.py"))

# For each row of the table: the flag as it is given, what makes it idle, and what would make it act.
CASES = {
    "recompute": ("True", ["--ms_mode", "1"], ["--ms_mode", "0"]),
    "random_crop": ("True", ["--cache_dir", "c"], []),
    "validation_data": ("x", [], ["--validation_interval", "5"]),
    "validation_count": ("4", [], ["--validation_interval", "5"]),
    "validation_steps": ("20", [], ["--validation_interval", "5"]),
    "validation_interval": ("2001", ["--max_steps", "2000"], ["--max_steps", "0"]),
    "end_learning_rate": ("1e-05", ["--scheduler", "constant"], ["--scheduler", "cosine"]),
    "init_loss_scale": ("65536.0", ["--dtype", "float32"], ["--dtype", "float16"]),
    "loss_scale_factor": ("2.0", ["--device_target", "CPU"], ["--dtype", "float16"]),
    "scale_window": ("100", ["--device_target", "CPU"], ["--device_target", "Ascend"]),
    "cpu_threads": ("2", ["--device_target", "Ascend"], ["--device_target", "CPU"]),
    "open_clip_vit": (__file__, ["--pretrained_model_path", "w.ckpt"], []),
}


def answer(outcome, setting: str, beside: list) -> tuple:
    """What the script that has the flag says to it, and to a data set that is missing, which is found afterwards."""
    words = ["--data_path", "/nonexistent", f"--{setting}", CASES[setting][0], *beside]
    if setting == "open_clip_vit":
        return outcome(TRAIN_DEMO["main"], "--part", "clip", *words)
    return outcome(train_sd.main, *words)


def test_every_row_of_the_table_is_held():
    assert CASES.keys() == {idle.setting for idle in IDLE} and len(CASES) == len(IDLE)


@pytest.mark.parametrize("idle", IDLE, ids=lambda idle: idle.setting)
def test_a_setting_of_no_effect_is_one_line(idle, outcome):
    _, spoilt, good = CASES[idle.setting]
    status, said = answer(outcome, idle.setting, spoilt)
    assert status == 2 and f"--{idle.setting} {CASES[idle.setting][0]} is of no effect: " in said, said
    assert len(said.splitlines()) == 1
    status, said = answer(outcome, idle.setting, good)
    assert status == 2 and "--data_path /nonexistent: no such file" in said, said


def test_what_nobody_asked_for_is_not_idle(outcome, tmp_path):
    """Defaults, and flags that say no; but a configuration file asks too."""
    for more in (["--ms_mode", "1"], ["--recompute", "False", "--ms_mode", "1"],
                 ["--random_crop", "False", "--cache_dir", "c"], ["--validation_interval", "0"]):
        assert "/nonexistent: no such file" in outcome(train_sd.main, "--data_path", "/nonexistent", *more)[1]
    (tmp_path / "a.yaml").write_text("recompute: true\nvalidation_count: 2\nvalidation_interval: 1\n")
    words = ["--config", tmp_path / "a.yaml", "--data_path", "/nonexistent"]
    assert "--recompute True is of no effect" in outcome(train_sd.main, *words, "--ms_mode", "1")[1]
    assert "--validation_count 2 is of no effect" in outcome(train_sd.main, *words, "--validation_interval", "0")[1]


@pytest.mark.parametrize("main, version", [(train_sd.main, "1.5"), (train_sd.main, "demo"), (train_sdxl.main, "xl"),
                                           (train_sdxl.main, "demo"),
                                           *((TRAIN_DEMO["main"], part) for part in TRAINING_DEMO)])
def test_no_configuration_of_ours_has_settings_of_no_effect(main, version, outcome):
    flag = "--version" if main in (train_sd.main, train_sdxl.main) else "--part"
    status, said = outcome(main, flag, version, "--data_path", "/nonexistent", "--device_target", "CPU")
    assert status == 2 and "--data_path /nonexistent: no such file" in said, said


@pytest.mark.parametrize("part", TRAINING_DEMO)
def test_a_part_has_no_flags_that_it_does_not_use(part, outcome, tmp_path):
    unused = TRAIN_DEMO["unused_settings"](part)
    learns_from_features = part.startswith(("unet", "controlnet"))
    assert ("p2_k" in unused) == ("drop_text_prob" in unused) == ("cache_dir" in unused) == (not learns_from_features)
    assert {"random_crop", "validation_interval", "drop_image_prob", "recompute", "buckets"} < set(unused)
    defaults = {setting.name: setting.default for setting in fields(TrainingConfig)}
    for setting in unused:
        status, said = outcome(TRAIN_DEMO["main"], "--part", part, "--data_path", "x", f"--{setting}", "1")
        assert status == 2 and f"unknown flag --{setting}" in said and len(said.splitlines()) == 1, said
        other = {bool: "true", str: "x", float: "0.7"}.get(type(defaults[setting]), "7")
        (tmp_path / "a.yaml").write_text(f"{setting}: {other}\n")
        status, said = outcome(TRAIN_DEMO["main"], "--part", part, "--data_path", "x", "--config", tmp_path / "a.yaml")
        assert status == 2 and f"--config: {setting} is of no effect with --part {part}; remove it" in said, said


def test_a_part_that_needs_features_needs_a_folder_for_them(outcome):
    status, said = outcome(TRAIN_DEMO["main"], "--part", "unet", "--data_path", "x", "--cache_dir", "")
    assert status == 2 and "--cache_dir is empty" in said


@pytest.mark.parametrize("length, devices, changed, expected", [
    (10, 1, {}, (2, 4, 2)), (10, 2, {}, (4, 4, 2)), (10, 1, {"epochs": 1, "max_steps": 0}, (2, 5, 2)),
    (11, 1, {"epochs": 1}, (2, 4, 2)), (3, 1, {"epochs": 1}, (2, 2, 2)),
    (10, 1, {"step_mode": False, "ckpt_save_interval": 3}, (2, 4, 15)),
    (10, 1, {"gradient_accumulation_steps": 3, "epochs": 2}, (6, 4, 2))])
def test_the_steps_of_a_training(length, devices, changed, expected):
    assert plan(flags("x", **changed), length, devices) == expected


def test_a_folder_is_free_unless_its_files_would_be_overwritten(tmp_path):
    """Of saves at steps 2 and 4 only; those of other names, other steps, or beyond the last are nobody's concern."""
    (tmp_path / "ckpt").mkdir()
    args = flags(tmp_path)
    steps = plan(args, 10, 1)
    for name, free in (("line-3.ckpt", True), ("line-6.ckpt", True), ("other-4.ckpt", True), ("line-4_full.ckpt", True),
                       ("line-2.safetensors", False), ("line-4.ckpt", False), (STATE, False)):
        (tmp_path / "ckpt" / name).write_bytes(b"")
        if free:
            assert state_to_resume(args, "ckpt/line-{}", steps) is None
        else:
            with pytest.raises(UserError, match="--output_path .*: holds a training already; go on with it"):
                state_to_resume(args, "ckpt/line-{}", steps)
        (tmp_path / "ckpt" / name).unlink()
    with pytest.raises(UserError, match="--resume .*train_resume.ckpt: no such file"):
        state_to_resume(flags(tmp_path, resume=True), "ckpt/line-{}", steps)
    (tmp_path / "ckpt" / STATE).write_bytes(b"")
    assert state_to_resume(flags(tmp_path, resume=True), "ckpt/line-{}", steps) == tmp_path / "ckpt" / STATE


@pytest.mark.parametrize("flag, value, expected", [
    ("--output_path", "run", "holds a training already"), ("--resume", "none.ckpt", "none.ckpt: no such file"),
    ("--random_crop", "True", "--random_crop True is of no effect"), ("--data_path", "none", "none: no such file")])
def test_mindspore_is_not_imported_for_it(six, flag, value, expected):
    """In a process of its own; the weights, which are looked for later, do not exist either."""
    (six / "run" / "ckpt").mkdir(parents=True)
    (six / "run" / "ckpt" / STATE).write_bytes(b"")
    words = ["--data_path", ".", "--pretrained_model_path", "none", "--cache_dir", "c", flag, value]
    program = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['train_sd.py', *{words!r}]\n"
               "import train_sd\nfrom ip_adapter.cli.script import execute\n"
               "try: execute(train_sd.main)\n"
               "finally: print('mindspore' in sys.modules)")
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=six)
    assert result.returncode == 2 and expected in result.stderr and result.stdout == "False\n", result.stderr


def test_flags_of_no_parser_are_passed_over():
    check_idle(argparse.Namespace(**{**vars(TrainingConfig()), "ms_mode": 0, "dtype": None, "device_target": None}), ())
