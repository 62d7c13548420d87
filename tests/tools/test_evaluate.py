"""tools/evaluate.py: pictures, scores, table and sheet; it goes on after a stop, and refuses other settings."""
from __future__ import annotations

import json
import re
import runpy

import numpy as np
import pandas
import pytest
from PIL import Image

from ip_adapter.drawn_world import draw, random_scene
from ip_adapter.standins import write_clip_standin
from tests.conftest import ROOT, narrow_xl

MAIN = runpy.run_path(str(ROOT / "tools" / "evaluate.py"))["main"]


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
        file.write("2,2.p")  # cut off by a kill
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
    status, said = outcome(MAIN, *words, "--seed", "7")
    assert status == 2 and re.search("holds an evaluation with seed 42 .now 7.", said)


def test_without_a_clip_only_pictures_are_compared(words, tmp_path, outcome):
    status, said = outcome(MAIN, *words, "--count", "1")
    assert status == 0 and "needs --clip" in said
    assert pandas.read_csv(tmp_path / "out" / "results.csv")["clip_t"].isna().all()


def test_mistakes(words, standins, tmp_path, outcome):
    for flags, expected in ((["--images", tmp_path / "absent"], "--images .*absent"),
                            (["--clip", standins["vae"]], "holds no whole CLIP"),
                            (["--weights", tmp_path / "a.ckpt"], "a.ckpt: no such file"),
                            (["--size", "100"], "multiple of 8"),
                            (["--varations", "1"], "did you mean --variations")):
        status, said = outcome(MAIN, *words, *flags)
        assert status == 2 and re.search(expected, said.strip().splitlines()[-1]), said
        assert not (tmp_path / "out").exists()
