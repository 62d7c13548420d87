"""tools/evaluate.py: pictures, scores, table and sheet; it goes on after a stop, and refuses other settings."""
from __future__ import annotations

import json
import re
import runpy
from dataclasses import replace

import numpy as np
import pandas
import pytest
from PIL import Image

from ip_adapter.cli.inference import EITHER
from ip_adapter.config import InferenceConfig, load_config
from ip_adapter.demo.scenes import draw, random_scene
from ip_adapter.evaluation.clip_evaluation import Evaluation, read_results
from ip_adapter.evaluation.results import own_folder
from ip_adapter.weights.dummy import write_clip_standin
from ldm.errors import UserError
from tests.support.scripts import ROOT, narrow_xl

TOOL = runpy.run_path(str(ROOT / "tools" / "evaluate.py"))
MAIN, DEFAULT = TOOL["main"], TOOL["default_checkpoint"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    for n in range(3):
        draw(random_scene(np.random.default_rng(n)), 64).save(folder / f"{n}.png")
    (folder / "img_txt.csv").write_text("dir,text\n0.png,a circle\n1.png,\"a square, blue\"\n2.png,a star\n")
    return folder


@pytest.fixture
def words(world, merged, tmp_path):
    return ["--images", world, "--weights", merged, "--out", tmp_path / "out", "--size", "64", "--sampling_steps", "2",
            "--variations", "2", "--ms_mode", "1"]


def test_sdxl_is_told_from_the_file(words, merged_xl, tmp_path, outcome):
    config = narrow_xl("inference/sd_xl_base.yaml", tmp_path / "small.yaml")
    status, said = outcome(MAIN, *words, "--weights", merged_xl, "--version", "xl", "--config", config, "--count", "1")
    assert status == 0 and "1 picture prompts x 2" in said, said


def test_it_goes_on_and_gives_one_table(words, tmp_path, outcome):
    write_clip_standin(tmp_path / "clip.safetensors")
    words += ["--clip", tmp_path / "clip.safetensors"]
    out = tmp_path / "out"
    status, said = outcome(MAIN, *words, "--count", "2")
    assert status == 0 and "2 picture prompts x 2" in said, said
    first = pandas.read_csv(out / "results.csv")
    mark = (out / "pictures" / "000000-0.png").stat().st_mtime_ns
    with open(out / "results.csv", "a") as file:
        file.write("2,2.png,0.3,1.")  # cut off by a kill, within its last number
    status, said = outcome(MAIN, *words)
    results = pandas.read_csv(out / "results.csv")
    assert status == 0 and len(results) == 3 and results[:2].equals(first)
    assert (out / "pictures" / "000000-0.png").stat().st_mtime_ns == mark  # not made again
    assert len(list((out / "pictures").iterdir())) == 6
    assert results["clip_i"].between(-1, 1).all() and results["clip_t"].between(0, 2.5).all()
    table = (out / "table.txt").read_text()
    assert f"{results['clip_i'].mean():.3f}   0.828" in table and f"{results['clip_t'].mean():.3f}   0.588" in table
    assert Image.open(out / "sheet.png").size == (3 * 64, 3 * 64)
    assert json.loads((out / "settings.json").read_text())["sampling_steps"] == 2
    status, said = outcome(MAIN, *words, "--clip_activation", "gelu")
    assert status == 2 and "holds an evaluation with clip_activation 'quick_gelu' (now 'gelu')" in said
    status, said = outcome(MAIN, *words, "--seed", "7")
    assert status == 2 and re.search("holds an evaluation with seed 42 .now 7.", said)


def test_a_stop_before_the_first_new_row_loses_nothing(words, tmp_path, outcome, monkeypatch):
    out = tmp_path / "out"
    assert outcome(MAIN, *words, "--count", "1")[0] == 0
    before = (out / "results.csv").read_bytes()
    for error, expected in ((KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 2)):
        def fail(*_, error=error):
            raise error
        with monkeypatch.context() as patch:
            patch.setattr(Evaluation, "_make" if expected == 130 else "_keep", fail)
            status, said = outcome(MAIN, *words)
        assert status == expected and "Traceback" not in said
        assert (out / "results.csv").read_bytes() == before
    assert re.search("--out .*out: cannot be written .No space left on device.; what is done so far is kept", said)
    assert sorted(path.name for path in out.iterdir()) == [
        "pictures", "results.csv", "settings.json", "sheet.png", "table.txt"]


def test_nothing_is_left_of_an_evaluation_without_a_row(words, tmp_path, outcome, monkeypatch):
    monkeypatch.setattr(Evaluation, "_make", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert outcome(MAIN, *words)[0] == 130 and not (tmp_path / "out").exists()


def test_rows_are_whole_or_left_out(tmp_path, caplog):
    file = tmp_path / "results.csv"
    file.write_bytes(b"row,dir,clip_i,clip_t\r\n0,a.png,0.5,\r\n1,\"b,c.png\",0.25,1.5\r\n2,d.png,nan,1\r\n"
                     b"x\0\xff,\"\r\n3,e.png,0.5\r\n1,twice.png,0.125,1\n4,f.png,0.5,1.2")
    assert read_results(file) == [{"row": 0, "dir": "a.png", "clip_i": 0.5, "clip_t": None},
                                  {"row": 1, "dir": "twice.png", "clip_i": 0.125, "clip_t": 1.0}]
    assert "5 rows are cut, damaged or doubled" in caplog.text
    assert read_results(tmp_path / "none.csv") == []


def test_damaged_settings_are_one_line(words, tmp_path, outcome):
    out = tmp_path / "out"
    assert outcome(MAIN, *words, "--count", "1")[0] == 0
    for content in (b"", b'{"seed": 4', b"[]", b"\xff\0", b"[" * 100_000):
        (out / "settings.json").write_bytes(content)
        status, said = outcome(MAIN, *words)
        assert status == 2 and "settings.json: is damaged" in said and len(said.strip().splitlines()) == 1, said
    (out / "settings.json").write_text("{}")
    assert "holds an evaluation with variations None (now 2)" in outcome(MAIN, *words)[1]


def test_two_evaluations_in_one_folder(words, tmp_path, outcome):
    with own_folder(tmp_path / "out", "--out"):
        status, said = outcome(MAIN, *words)
    assert status == 2 and "another process is writing into this folder" in said


@pytest.mark.parametrize("version", ["demo", "xl_demo"])
def test_the_demo_models_compare_texts_too(world, version, tmp_path, outcome):
    status, said = outcome(MAIN, "--images", world, "--version", version, "--out", tmp_path / "out", "--count", "1",
                           "--sampling_steps", "2", "--variations", "1", "--ms_mode", "1")
    assert status == 0 and "needs --clip" not in said, said
    assert 0 <= read_results(tmp_path / "out" / "results.csv")[0]["clip_t"] <= 2.5


def test_advice_is_that_of_the_family(world, tmp_path, outcome, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for version, tool, demo in (("1.5", "merge_ckpts_sd.py", "demo"), ("xl", "merge_ckpts_sdxl.py", "xl_demo")):
        config = load_config(InferenceConfig, ROOT / "configs" / EITHER[version])
        with pytest.raises(UserError, match=f"--weights: no file .*{tool} or try --version {demo}$"):
            DEFAULT(version, replace(config, ckpt_path=["none.ckpt"]))


def test_without_a_clip_only_pictures_are_compared(words, tmp_path, outcome):
    status, said = outcome(MAIN, *words, "--count", "1")
    assert status == 0 and "needs --clip" in said
    assert pandas.read_csv(tmp_path / "out" / "results.csv")["clip_t"].isna().all()


def test_mistakes(words, standins, tmp_path, outcome):
    for flags, expected in ((["--images", tmp_path / "absent"], "--images .*absent"),
                            (["--clip", standins["vae"]], "holds no whole CLIP"),
                            (["--weights", tmp_path / "a.ckpt"], "a.ckpt: no such file"),
                            (["--out", "/proc/no/folder"], "--out /proc/no/folder: cannot be written"),
                            (["--out", standins["vae"]], "--out .*: is not a folder"),
                            (["--size", "100"], "multiple of 8"),
                            (["--clip_activation", "gelu"], "--clip_activation is that of the model --clip names"),
                            (["--varations", "1"], "did you mean --variations")):
        status, said = outcome(MAIN, *words, *flags)
        assert status == 2 and re.search(expected, said.strip().splitlines()[-1]), said
        assert not (tmp_path / "out").exists()
