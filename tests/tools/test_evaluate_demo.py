"""The judge of the demo model counts what is right, and checkpoints of one training become a curve."""
from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from ip_adapter.config import ROOT, InferenceConfig, load_config
from ip_adapter.demo.evaluation import DemoJudge, figure_curves
from ip_adapter.demo.scenes import draw
from ip_adapter.demo.tasks import TASKS
from ip_adapter.weights.loading import ExtraParts, build_model
from tests.support.scripts import shell

DEMO = ROOT / "assets" / "sd_demo.safetensors"


@pytest.fixture(scope="module")
def judge():
    config = load_config(InferenceConfig, ROOT / "configs" / "inference" / "sd_demo.yaml")
    model = build_model(DEMO, config.model, extra=ExtraParts(controlnets=[None]))
    return DemoJudge(model, 96, 2, 7.5, seed=1_000_000, count=6, variations=2)


def test_the_scenes_themselves_are_right(judge):
    pictures = [np.stack([np.asarray(draw(scene, 96))] * 2) for scene in judge.scenes]
    figures, sheet = judge.judge(TASKS["controlnet"], pictures)
    assert figures["colour"] == figures["ground"] == figures["shape"] == 1 and figures["iou"] > 0.95
    assert figures["chance_iou"] < 0.8 and figures["chance_colour"] < 1
    assert sheet.shape == (6 * 96, 3 * 96, 3)
    figures, _ = judge.judge(TASKS["both"], pictures)  # whose ground is not the one the text names
    assert figures["both"] == figures["ground"] == 0 and figures["colour"] == 1
    wrong = pictures[1:] + pictures[:1]
    assert judge.judge(TASKS["image"], wrong)[0]["shape"] == judge.judge(TASKS["image"], pictures)[0]["chance_shape"]


def test_half_of_a_picture_is_its_own(judge):
    for scene, (first, *_) in zip(judge.scenes[:2], judge.batches(TASKS["inpainting"])):
        kept = np.asarray(draw(scene, 96))[:, 48:] if scene.x < 0.5 else np.asarray(draw(scene, 96))[:, :48]
        made = first[:, 48:] if scene.x < 0.5 else first[:, :48]
        assert np.mean(np.abs(made.astype(float) - kept) < 1) > 0.8  # but for the blurred border


def test_several_checkpoints_make_a_curve(tmp_path):
    for step in (20, 100):
        (tmp_path / f"unet-{step}.safetensors").symlink_to(DEMO)
    words = ["--count", "2", "--variations", "1", "--steps", "2", "--ms_mode", "1", "--task", "text", "--task", "image"]
    out, files = tmp_path / "out", sorted(tmp_path.glob("unet-*"))

    def evaluate(*words):
        return shell("python", ROOT / "tools" / "evaluate_demo.py", "--out", out, *words, cwd=tmp_path)

    result = evaluate("--ckpt_path", *files, *words)
    assert result.returncode == 0, result.stderr
    figures = [json.loads((out / step / "figures.json").read_text()) for step in ("20", "100")]
    assert figures[0]["text"] == figures[1]["text"] and figures[0]["checkpoint"] == "unet-20.safetensors"
    assert Image.open(out / "curves.png").size == (640, 2 * 320)
    nameless = files[0].rename(tmp_path / "best.safetensors")
    result = evaluate("--ckpt_path", nameless, files[1])
    assert result.returncode == 2 and "best.safetensors: has no step in its name" in result.stderr
    result = evaluate("--ckpt_path", *files[1:] * 2, "--ip_adapter", *files[1:] * 2)
    assert result.returncode == 2 and "the curve is of one of them" in result.stderr
    before = (out / "20" / "figures.json").read_bytes()
    for place, expected in ((out / "curves.png", "is not a folder"), ("/proc/none", "cannot be written")):
        result = evaluate("--out", place, *words)
        assert result.returncode == 2 and expected in result.stderr and len(result.stderr.splitlines()) == 1
    assert (out / "20" / "figures.json").read_bytes() == before
    assert sorted(path.name for path in (out / "20").iterdir()) == ["figures.json", "image.png", "text.png"]
    assert sorted(path.name for path in out.iterdir()) == ["100", "20", "curves.png"]


def test_a_line_for_each_figure():
    figures = {step: {"image": {"colour": 0.5, "shape": step / 100, "chance_shape": 0.1}} for step in (10, 50, 90)}
    pixels = np.asarray(figure_curves(figures)).reshape(-1, 3)
    for colour, drawn in (((200, 40, 40), True), ((30, 80, 200), True), ((40, 150, 60), False)):
        assert (pixels == colour).all(1).any() == drawn
