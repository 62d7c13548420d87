"""The drawing tool from the command line: what it writes, and mistakes as one line that leave nothing behind."""
from __future__ import annotations

import re
import runpy
import subprocess
import sys

import pandas
import pytest
from PIL import Image

from ip_adapter.demo.scenes import COLOURS, SHAPES, Scene, agreement, draw, look
from tests.support.scripts import ROOT

DRAW = runpy.run_path(str(ROOT / "tools" / "draw_world.py"))["main"]


def test_pictures_captions_and_scenes(tmp_path, outcome):
    out = tmp_path / "new" / "world"
    status, said = outcome(DRAW, "--out", out, "--count", 12, "--seed", 3, "--size", 96)
    assert status == 0 and f"12 pictures and img_txt.csv written into {out}" in said
    captions, drawn = pandas.read_csv(out / "img_txt.csv", keep_default_na=False), pandas.read_csv(out / "scenes.csv")
    names = [f"{number:05d}.png" for number in range(12)]
    assert list(captions.columns) == ["dir", "text"] and list(captions["dir"]) == list(drawn["dir"]) == names
    assert sorted(path.name for path in out.iterdir()) == [*names, "img_txt.csv", "scenes.csv"]
    for text, (name, *values) in zip(captions["text"], drawn.itertuples(index=False)):
        scene = Scene(*values)
        with Image.open(out / name) as image:
            assert image.size == (96, 96) and image.tobytes() == draw(scene, 96).tobytes()
            assert agreement(scene, look(image)) == (True, True, True)
        words = set(re.findall(r"\w+", text))  # a caption may leave things open, but says nothing wrong
        assert words & set(COLOURS) <= {scene.colour, scene.ground} and words & set(SHAPES) <= {scene.shape}
    assert list(tmp_path.iterdir()) == [tmp_path / "new"]


def test_more_pictures_start_with_the_same(tmp_path, outcome):
    (tmp_path / "five").mkdir()  # empty, as good as new
    for name, count in (("three", 3), ("five", 5)):
        assert outcome(DRAW, "--out", tmp_path / name, "--count", count)[0] == 0
    three, five = tmp_path / "three", tmp_path / "five"
    for name in ("00000.png", "00002.png"):
        assert (three / name).read_bytes() == (five / name).read_bytes()
    for name in ("img_txt.csv", "scenes.csv"):
        assert (five / name).read_text().startswith((three / name).read_text())
    assert outcome(DRAW, "--out", tmp_path / "other", "--count", 3, "--seed", 1)[0] == 0
    assert (tmp_path / "other" / "img_txt.csv").read_text() != (three / "img_txt.csv").read_text()


def test_alike_pictures_differ_by_shape_and_place(tmp_path, outcome):
    flags = ["--out", tmp_path / "alike", "--count", "16", "--size", "32", "--alike", "8", "--captions", "whole"]
    assert outcome(DRAW, *flags)[0] == 0
    drawn = pandas.read_csv(tmp_path / "alike" / "scenes.csv")
    texts = pandas.read_csv(tmp_path / "alike" / "img_txt.csv")["text"]
    pairs = list(zip(drawn["colour"], drawn["ground"]))
    assert len(set(pairs[:8])) == len(set(pairs[8:])) == 1 and pairs[0] != pairs[8]
    assert drawn["shape"][:8].nunique() > 1 and drawn["x"].nunique() == 16
    for text, (colour, ground), shape in zip(texts, pairs, drawn["shape"]):
        assert colour in text and ground in text and shape in text


def test_picture_prompts_on_another_ground(tmp_path, outcome):
    """The caption then names the picture's own ground, and nothing else."""
    out = tmp_path / "pairs"
    assert outcome(DRAW, "--out", out, "--count", 40, "--size", 64, "--other_ground", 0.5)[0] == 0
    drawn = [Scene(*values) for _, *values in pandas.read_csv(out / "scenes.csv").itertuples(index=False)]
    rows = pandas.read_csv(out / "img_txt.csv", keep_default_na=False)
    pairs = [(scene, text, prompt) for scene, text, prompt in zip(drawn, rows["text"], rows["image_prompt"]) if prompt]
    assert 10 < len(pairs) < 30 and len(list(out.glob("*.png"))) == 40 + len(pairs)
    for scene, text, prompt in pairs:
        assert set(text.split()) & {*COLOURS, *SHAPES} == {scene.ground}
        with Image.open(out / prompt) as image:
            seen = look(image)
        assert (seen.shape, seen.colour) == (scene.shape, scene.colour) and seen.ground != scene.ground


def test_mistakes(tmp_path, outcome):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "img_txt.csv").write_text("dir,text\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "00000.png").write_bytes(b"mine")
    (tmp_path / "file").write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))
    cases = [
        (["--out", tmp_path / "taken"], "--out .*taken: already holds img_txt.csv, expected .*; name another"),
        (["--out", tmp_path / "mine"], "--out .*mine: already holds 00000.png"),
        (["--out", tmp_path / "file"], "--out .*file: is not a folder; name another folder"),
        (["--out", ""], "--out is empty; name another folder"),
        (["--out", tmp_path / ("x" * 300)], "x: cannot be written .File name too long"),
        (["--out", tmp_path / "file" / "world"], "--out .*world: cannot be written"),
        (["--out", tmp_path / "new", "--count", "0"], "--count: 0 is out of range"),
        (["--out", tmp_path / "new", "--size", "big"], "--size: 'big' is not a whole number"),
        (["--out", tmp_path / "new", "--seed", "-1"], "--seed"),
        (["--count", "3"], "required: --out"),
        (["--out", tmp_path / "new", "--conut", "3"], "unknown flag --conut; did you mean --count"),
    ]
    for flags, expected in cases:
        status, said = outcome(DRAW, *flags)
        assert status == 2 and re.search(expected, said.strip().splitlines()[-1]) and "Traceback" not in said, said
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "mine" / "00000.png").read_bytes() == b"mine"


@pytest.mark.parametrize("error, expected", [(OSError(28, "No space left on device"), 2), (KeyboardInterrupt(), 130)])
def test_an_unfinished_folder_is_removed(tmp_path, outcome, monkeypatch, error, expected):
    def fail(*_):
        raise error
    monkeypatch.setitem(DRAW.__globals__, "training_caption", fail)
    status, said = outcome(DRAW, "--out", tmp_path / "new" / "world", "--count", 3)
    assert status == expected and "Traceback" not in said and not list(tmp_path.iterdir())


def test_a_signal_leaves_nothing(tmp_path):
    """What the program does when one arrives while pictures are drawn."""
    program = ("import os, runpy, sys; from ldm.files import remove_unfinished\n"
               "main = runpy.run_path('tools/draw_world.py')['main']\n"
               "main.__globals__['training_caption'] = lambda *_: (remove_unfinished(), os._exit(143))\n"
               "main(['--out', sys.argv[1], '--count', '3'])")
    result = subprocess.run([sys.executable, "-c", program, tmp_path / "new" / "world"], cwd=ROOT, timeout=60)
    assert result.returncode == 143 and not list(tmp_path.iterdir())


def test_a_link_to_an_empty_folder_is_filled(tmp_path, outcome):
    (tmp_path / "disk").mkdir()
    (tmp_path / "world").symlink_to("disk")
    assert outcome(DRAW, "--out", tmp_path / "world", "--count", 2)[0] == 0
    assert len(list((tmp_path / "disk").iterdir())) == 4 and (tmp_path / "world").is_symlink()
