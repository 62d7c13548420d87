"""image_inpainting_sd.py end to end: the same pictures as diffusers, kept pixels kept, and mistakes."""
from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from image_inpainting_sd import main
from tests.support.arrays import DATA, pictures, psnr
from tests.support.scripts import ROOT, assert_mistakes, overridden, shell


@pytest.fixture
def original() -> np.ndarray:
    """The reference as it enters the network."""
    return np.asarray(Image.open(DATA / "input.png").convert("RGB").resize((104, 72), Image.LANCZOS))


@pytest.fixture
def mask() -> np.ndarray:
    return np.asarray(Image.open(DATA / "mask.png").convert("L")) >= 128


@pytest.fixture
def words(merged):
    return ["--ckpt_path", merged, "--img", DATA / "input.png", "--ref_img", DATA / "input.png", "--ref_mask",
            DATA / "mask.png", "--H", "72", "--W", "104", "--sampling_steps", "3", "--n_samples", "1"]


def test_the_picture_of_diffusers(words, recorded, tmp_path, outcome):
    """Recorded by tests/record/record_sd.sh: 4 of 7 steps, kept pixels put back."""
    status, said = outcome(main, *overridden(words, [
        "--ckpt_path", recorded, "--latents", DATA / "sd_latents.npy", "--n_samples", "2", "--sampling_steps", "7",
        "--prompt", "a red circle", "--ip_scale", "0.8", "--output_path", tmp_path]))
    assert status == 0, said
    made = pictures(tmp_path)
    assert len(made) == 2
    for n, picture in enumerate(made):
        assert psnr(picture, Image.open(DATA / f"sd_reference_inpainting_{n}.png")) > 70


def test_kept_pixels_are_identical(words, tmp_path, outcome, original, mask):
    outcome(main, *words, "--output_path", tmp_path)
    outcome(main, *words, "--mask_blur", "3", "--output_path", tmp_path)
    outcome(main, *words, "--invert_mask", "--output_path", tmp_path)
    outcome(main, *words, "--paste_original", "False", "--output_path", tmp_path)
    hard, soft, inverted, bare = pictures(tmp_path)
    np.testing.assert_array_equal(hard[~mask], original[~mask])
    np.testing.assert_array_equal(soft[~mask], original[~mask])
    np.testing.assert_array_equal(inverted[mask], original[mask])
    np.testing.assert_array_equal(bare[mask], hard[mask])
    assert (bare[~mask] != original[~mask]).mean() > 0.5
    assert (hard[mask] != original[mask]).mean() > 0.5 and (inverted[~mask] != original[~mask]).mean() > 0.5
    assert (soft != hard).any()
    assert Image.open(tmp_path / "grid-00000.png").size == (4 * 104, 72)
    text = Image.open(tmp_path / "samples" / "00002.png").text
    assert text["invert_mask"] == "True" and text["strength"] == "0.7" and text["ref_mask"].endswith("mask.png")


def test_the_mask_may_have_another_size(words, tmp_path, outcome, mask, original):
    path = tmp_path / "mask.png"
    Image.fromarray(mask).resize((312, 216)).save(path)
    status, said = outcome(main, *overridden(words, ["--ref_mask", path, "--output_path", tmp_path]))
    assert status == 0 and "mask.png: resized from 312x216 to 104x72" in said
    np.testing.assert_array_equal(pictures(tmp_path)[0][~mask], original[~mask])


@pytest.mark.slow
def test_a_controlnet_in_graph_mode(words, merged_control, tmp_path):
    for mode in ("0", "1"):
        result = shell("python", ROOT / "image_inpainting_sd.py", *words, "--ckpt_path", merged_control, "--ms_mode",
                       mode, "--control_image", DATA / "hint.png", "--output_path", tmp_path, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    graph, pynative = pictures(tmp_path)
    assert graph.shape == (72, 104, 3) and psnr(graph, pynative) > 70


def test_every_mistake_is_one_line_and_leaves_nothing(words, tmp_path, outcome):
    folder = tmp_path / "files"
    folder.mkdir()
    Image.new("L", (104, 72)).save(folder / "black.png")
    (folder / "text.png").write_bytes(b"text")
    assert_mistakes(outcome, main, words, {
        "--ref_mask": (["--ref_mask", folder / "absent.png"], "absent.png: no such file"),
        "not a picture": (["--ref_mask", folder / "text.png"], "--ref_mask .*is not an image"),
        "nothing": (["--ref_mask", folder / "black.png"], "black.png: nothing to repaint, no pixel is white"),
        "strength": (["--strength", "0.3"], "--strength 0.3 leaves none of the 3 steps; expected at least 0.333"),
        "boolean": (["--paste_original", "maybe"], "'maybe' is neither True nor False"),
        "blur": (["--mask_blur", "-1"], "-1 is out of range, expected 0 to 256"),
        "blur without paste": (["--mask_blur", "2", "--paste_original", "False"], "--mask_blur .* needs"),
    }, folder)
