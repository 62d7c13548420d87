"""image_to_image_sd.py end to end: the same pictures as diffusers, sizes, and mistakes."""
from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from image_to_image_sd import main
from tests.support.arrays import DATA, pictures, psnr
from tests.support.scripts import assert_mistakes

REFERENCE = ["--ref_img", DATA / "input.png", "--sampling_steps", "4", "--n_samples", "1"]


@pytest.fixture
def words(merged, picture):
    return ["--ckpt_path", merged, "--img", picture, *REFERENCE]


def test_the_picture_of_diffusers(recorded, tmp_path, outcome):
    """Recorded by tests/record/record_sd.sh: 4 of 7 steps, the reference resized to 104x72."""
    status, said = outcome(main, "--ckpt_path", recorded, "--img", DATA / "input.png", "--ref_img", DATA / "input.png",
                           "--latents", DATA / "sd_latents.npy", "--H", "72", "--W", "104", "--sampling_steps", "7",
                           "--n_iter", "2", "--prompt", "a red circle", "--ip_scale", "0.8", "--output_path", tmp_path)
    assert status == 0, said
    for n, made in enumerate(pictures(tmp_path)):
        assert psnr(made, Image.open(DATA / f"sd_reference_image_to_image_{n}.png")) > 70


def test_the_size_is_the_references_and_the_grid_shows_both(words, tmp_path, outcome):
    status, said = outcome(main, *words, "--output_path", tmp_path)
    assert status == 0 and "input.png: resized from 120x90 to 120x88" in said
    assert pictures(tmp_path)[0].shape == (88, 120, 3)
    assert Image.open(tmp_path / "grid-00000.png").size == (360, 88)
    text = Image.open(tmp_path / "samples" / "00000.png").text
    assert text["strength"] == "0.6" and text["ref_img"] == "input.png" and (text["W"], text["H"]) == ("120", "88")


def test_strength_moves_the_result_away_from_the_reference(words, tmp_path, outcome):
    """At 1 every step is run, from the reference all but drowned in noise."""
    for strength in ("0.25", "1"):
        outcome(main, *words, "--strength", strength, "--output_path", tmp_path)
    little, much = pictures(tmp_path)
    original = np.asarray(Image.open(DATA / "input.png").convert("RGB").resize((120, 88), Image.LANCZOS))
    assert not np.array_equal(little, much)
    assert psnr(little, original) != psnr(much, original)


def test_the_same_seed_gives_the_same_picture(words, tmp_path, outcome):
    for _ in range(2):
        outcome(main, *words, "--seed", "3", "--output_path", tmp_path)
    first, second = pictures(tmp_path)
    np.testing.assert_array_equal(first, second)


def test_every_mistake_is_one_line_and_leaves_nothing(words, tmp_path, outcome):
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "empty.png").write_bytes(b"")
    Image.new("RGB", (3000, 2000)).save(folder / "large.png")
    assert_mistakes(outcome, main, words, {
        "--ref_img": (["--ref_img", folder / "absent.png"], "absent.png: no such file"),
        "empty": (["--ref_img", folder / "empty.png"], "--ref_img .*empty.png: the file is empty"),
        "large": (["--ref_img", folder / "large.png"], "--ref_img .*3000x2000 pixels.* give --H or --W"),
        "strength 0": (["--strength", "0"], "--strength 0.0 leaves none of the 4 steps; expected at least 0.25"),
        "strength small": (["--strength", "0.2"], "--strength 0.2 leaves none of the 4 steps; expected at least 0.25"),
        "strength": (["--strength", "1.01"], "--strength.*1.01 is out of range, expected 0 to 1"),
        "strength nan": (["--strength", "nan"], "nan is out of range"),
    }, folder)
