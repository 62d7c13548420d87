"""controlnet_sd.py end to end: the same pictures as diffusers, one or several ControlNets, when they act, mistakes."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import image_inpainting_sd
import image_variation_sd
from controlnet_sd import main
from ip_adapter.families import SD15
from ip_adapter.weights.dummy import MINIATURE, write_standins
from ip_adapter.weights.merging import merge
from tests.support.arrays import DATA, pictures, psnr
from tests.support.dummies import SHALLOW
from tests.support.scripts import assert_mistakes

RECORDED = ["--img", DATA / "input.png", "--latents", DATA / "sd_latents.npy", "--H", "72", "--W", "104",
            "--sampling_steps", "7", "--prompt", "a red circle", "--ip_scale", "0.8", "--n_samples", "2"]
SMALL = ["--img", DATA / "input.png", "--control_image", DATA / "hint.png", "--H", "64", "--W", "64",
         "--sampling_steps", "4", "--n_samples", "1"]


@pytest.fixture(scope="module")
def second(tmp_path_factory) -> dict:
    """The recorded stand-ins with other values."""
    return write_standins(tmp_path_factory.mktemp("second"), MINIATURE, seed=1)


def test_the_picture_of_diffusers(recorded, tmp_path, outcome):
    """Recorded by tests/record/record_sd.sh: acts in steps 2 to 5 of 7."""
    status, said = outcome(main, *RECORDED, "--ckpt_path", recorded, "--control_img", DATA / "hint.png",
                           "--control_scale", "0.9", "--control_start", "0.1", "--control_end", "0.8",
                           "--output_path", tmp_path)
    assert status == 0, said
    made = pictures(tmp_path)
    assert len(made) == 2
    for n, picture in enumerate(made):
        assert psnr(picture, Image.open(DATA / f"sd_reference_controlnet_{n}.png")) > 70


@pytest.mark.parametrize("from_merged", [True, False])
def test_two_controlnets_and_an_inpainting_of_diffusers(recorded, standins_recorded, second, tmp_path, outcome,
                                                       from_merged):
    """Recorded with strength 1; the first ControlNet is the checkpoint's own, or given as a file like the second."""
    first = [] if from_merged else ["--controlnet", standins_recorded["controlnet"]]
    status, said = outcome(image_inpainting_sd.main, *RECORDED, "--ckpt_path", recorded, "--ref_img",
                           DATA / "input.png", "--ref_mask", DATA / "mask.png", "--strength", "1",
                           "--control_image", DATA / "hint.png", "--control_image", DATA / "input.png",
                           *first, "--controlnet", second["controlnet"], "--control_scale", "0.9",
                           "--control_scale", "0.4", "--output_path", tmp_path)
    assert status == 0, said
    for n, picture in enumerate(pictures(tmp_path)):
        assert psnr(picture, Image.open(DATA / f"sd_reference_two_controlnets_{n}.png")) > 70
    assert Image.open(tmp_path / "grid-00000.png").size == (7 * 104, 72)


def test_without_influence_it_is_image_variation(merged_control, tmp_path, outcome):
    """Bit for bit: at scale 0, and where no whole step lies between start and end."""
    for script, flags in ((main, ["--control_scale", "0"]), (main, ["--control_start", "0.9"]), (main, [])):
        outcome(script, "--ckpt_path", merged_control, *SMALL, *flags, "--output_path", tmp_path)
    plain = [word for word in SMALL if word not in ("--control_image", DATA / "hint.png")]
    outcome(image_variation_sd.main, "--ckpt_path", merged_control, *plain, "--output_path", tmp_path)
    zero, late, full, variation = pictures(tmp_path)
    np.testing.assert_array_equal(zero, variation)
    np.testing.assert_array_equal(late, variation)
    assert psnr(full, variation) < 40


def test_parts_given_directly_equal_a_new_merge(merged_control, standins, tmp_path, outcome):
    other = write_standins(tmp_path / "other", SHALLOW, seed=1)
    parts = {flag: other[flag] for flag in ("ip_adapter", "vae", "controlnet")}
    out = tmp_path / "merged.ckpt"
    merge(SD15, **{**standins, **parts}, out=out)
    outcome(main, "--ckpt_path", out, *SMALL, "--output_path", tmp_path)
    flags = [word for flag, path in parts.items() for word in (f"--{flag}", path)]
    status, said = outcome(main, "--ckpt_path", merged_control, *SMALL, *flags, "--output_path", tmp_path)
    assert status == 0, said
    merged, direct = pictures(tmp_path)
    np.testing.assert_array_equal(merged, direct)
    text = Image.open(tmp_path / "samples" / "00001.png").text
    assert text["ip_adapter"] == "ip-adapter_sd15.safetensors" and len(text["controlnet_sha256"]) == 64
    outcome(main, "--ckpt_path", merged_control, *SMALL, "--output_path", tmp_path)
    assert psnr(pictures(tmp_path)[-1], merged) < 40


def test_an_adapter_completes_a_checkpoint_merged_without_one(merged, standins, tmp_path, outcome):
    bare = tmp_path / "bare.ckpt"
    merge(SD15, **{**standins, "ip_adapter": None, "controlnet": None}, out=bare, skip_ip=True)
    small = ["--img", DATA / "input.png", "--H", "64", "--W", "64", "--sampling_steps", "2", "--n_samples", "1"]
    status, said = outcome(image_variation_sd.main, "--ckpt_path", bare, *small, "--output_path", tmp_path)
    assert status == 2 and "holds no IP-Adapter" in said and "--ip_adapter" in said
    for checkpoint, flags in ((bare, ["--ip_adapter", standins["ip_adapter"]]), (merged, [])):
        status, said = outcome(image_variation_sd.main, "--ckpt_path", checkpoint, *small, *flags,
                               "--output_path", tmp_path)
        assert status == 0, said
    np.testing.assert_array_equal(*pictures(tmp_path))


def test_edges_are_made_and_saved(merged_control, tmp_path, outcome):
    words = ["--ckpt_path", merged_control, *SMALL]
    words[words.index(DATA / "hint.png")] = DATA / "input.png"
    status, said = outcome(main, *words, "--canny", "50", "100", "--output_path", tmp_path)
    assert status == 0, said
    edges = tmp_path / "canny-00000.png"
    assert set(np.unique(np.asarray(Image.open(edges)))) == {0, 255} and Image.open(edges).size == (64, 64)
    words[words.index("--control_image") + 1] = edges
    outcome(main, *words, "--output_path", tmp_path)
    made, given = pictures(tmp_path)
    np.testing.assert_array_equal(made, given)
    assert Image.open(tmp_path / "samples" / "00000.png").text["canny"] == "50 100"
    assert len(list(tmp_path.glob("canny-*.png"))) == 1


@pytest.mark.slow
def test_float16_stays_close(merged_control, tmp_path, outcome):
    for dtype in ("float32", "float16"):
        status, said = outcome(main, "--ckpt_path", merged_control, *SMALL, "--sampling_steps", "1", "--dtype", dtype,
                               "--output_path", tmp_path)
        assert status == 0, said
    assert psnr(*pictures(tmp_path)) > 35


def test_every_mistake_is_one_line_and_leaves_nothing(merged, merged_control, standins, tmp_path, outcome):
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "text.png").write_bytes(b"text")
    hint = DATA / "hint.png"
    cut = folder / "cut.safetensors"
    cut.write_bytes(standins["controlnet"].read_bytes()[:3000])
    wide = write_standins(folder / "wide", replace(SHALLOW, unet=replace(SHALLOW.unet, model_channels=64)))
    assert_mistakes(outcome, main, ["--ckpt_path", merged_control, *SMALL], {
        "--control_image": (["--control_image", folder / "absent.png"], "absent.png: no such file"),
        "not a picture": (["--control_image", folder / "text.png"], "--control_image .*is not an image"),
        "two hints": (["--control_image", hint, "--control_image", hint], "given 2 times, --controlnet 0 times"),
        "too many": (["--controlnet", standins["controlnet"]] * 2, "--controlnet is given 2 times, --control_image 1"),
        "without": (["--ckpt_path", merged], "holds no ControlNet; merge one .* or give --controlnet FILE"),
        "another file": (["--controlnet", standins["vae"]], "--controlnet .*holds no ControlNet"),
        "truncated": (["--controlnet", cut], "cut.safetensors"),
        "another base": (["--controlnet", wide["controlnet"]], "is for a UNet of 64 .*trained for another base model"),
        "scale": (["--control_scale", "11"], "11 is out of range"),
        "scales": (["--control_scale", "1", "--control_scale", "1"], "--control_scale is given 2 times, expected once"),
        "start": (["--control_start", "0.6", "--control_end", "0.4"], "--control_start 0.6 is not before"),
        "end": (["--control_end", "1.2"], "1.2 is out of range, expected 0 to 1"),
        "canny": (["--canny", "100"], "--canny"),
        "canny negative": (["--canny", "0", "-3"], "-3 is out of range"),
    }, folder)
    status, said = outcome(main, "--ckpt_path", merged_control, "--img", hint)
    assert status == 2 and "--control_image" in said
