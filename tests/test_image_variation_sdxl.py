"""image_variation_sdxl.py and controlnet_sdxl.py end to end on small stand-ins, their files and their mistakes."""
from __future__ import annotations

import weakref

import numpy as np
import pytest
from PIL import Image

import controlnet_sdxl
from image_variation_sdxl import main
from ip_adapter.config import ROOT, InferenceConfig, load_config
from ip_adapter.families import SDXL
from ip_adapter.inference import run
from ip_adapter.weights.loading import ExtraParts, ImagePromptModel, build_model
from ip_adapter.weights.merging import convert, merge
from ldm.model import LatentDiffusion
from tests.support.arrays import DATA, arrays, pictures, psnr
from tests.support.scripts import assert_mistakes, narrow_xl
from tools import merge_ckpts_sdxl

CONFIG = ROOT / "configs" / "inference" / "sd_xl_base.yaml"


@pytest.fixture(scope="module")
def words(merged_xl, tmp_path_factory) -> list:
    """Flags of a quick run. The heads of the small UNet are narrower than SDXL's, which a configuration says."""
    config = narrow_xl("inference/sd_xl_base.yaml", tmp_path_factory.mktemp("config") / "small.yaml")
    return ["--config", config, "--weight", merged_xl, "--img", DATA / "input.png", "--H", "64", "--W", "72",
            "--sample_step", "3"]


@pytest.mark.parametrize("task, script, flags", [
    ("image_variation", main, []),
    ("controlnet", controlnet_sdxl.main, ["--control_image", DATA / "hint.png"])])
def test_the_picture_of_diffusers(words, recorded_xl, tmp_path, outcome, task, script, flags):
    """Recorded by tests/record/record_sdxl.sh, at an odd latent size; rounding alone leaves more than 80 dB."""
    status, said = outcome(script, *words, "--weight", recorded_xl, "--H", "72", "--W", "104", "--sample_step", "7",
                           "--prompt", "a red circle", "--ip_scale", "0.8", "--latents", DATA / "sd_latents.npy",
                           *flags, "--output_path", tmp_path)
    assert status == 0, said
    made = pictures(tmp_path)
    assert len(made) == 2
    for n, picture in enumerate(made):
        assert psnr(picture, Image.open(DATA / f"sdxl_reference_{task}_{n}.png")) > 70


@pytest.mark.slow
@pytest.mark.parametrize("script", [main, controlnet_sdxl.main])
def test_the_demo_model_needs_no_flag(tmp_path, outcome, script):
    status, said = outcome(script, "--version", "demo", "--sample_step", "4", "--output_path", tmp_path)
    assert status == 0, said
    made = pictures(tmp_path)
    assert [picture.shape for picture in made] == [(96, 96, 3)] * 4
    assert Image.open(tmp_path / "samples" / "00000.png").text["model"] == "SDXL demo"


def test_settings_and_seeds(words, tmp_path, outcome):
    status, said = outcome(main, *words, "--num_cols", "2", "--prompt", "a red circle", "--output_path", tmp_path)
    assert status == 0, said
    outcome(main, *words, "--num_cols", "1", "--seed", "43", "--prompt", "a red circle", "--output_path", tmp_path)
    first, second, again = pictures(tmp_path)
    assert first.shape == (64, 72, 3) and psnr(second, again) > 70 and psnr(first, second) < 30
    text = Image.open(tmp_path / "samples" / "00001.png").text
    assert (text["sampler"], text["guider"], text["scale"]) == ("EulerEDMSampler", "VanillaCFG", "5.0")
    assert text["discretization"] == "DiffusersDDPMDiscretization" and text["model"] == "SDXL-base-1.0"


@pytest.mark.parametrize("flags", [["--sampler", "EulerAncestralSampler"], ["--sampler", "HeunEDMSampler"],
                                   ["--sampler", "DPMPP2MSampler"], ["--discretization", "EDMDiscretization"],
                                   ["--guider", "IdentityGuider"], ["--orig_width", "512"], ["--ip_scale", "0"],
                                   ["--guidance_start", "0.3"], ["--guidance_end", "0.5"], ["--deep_every", "2"]])
def test_every_flag_changes_the_picture(words, tmp_path, outcome, flags):
    """And the same flags make the same picture, noise that is added on the way included."""
    for more in ([], flags, flags):
        status, said = outcome(main, *words, "--num_cols", "1", *more, "--output_path", tmp_path)
        assert status == 0, said
    plain, changed, again = pictures(tmp_path)
    assert psnr(plain, changed) < 60
    np.testing.assert_array_equal(changed, again)


def test_reference_and_mask(words, tmp_path, outcome):
    reference = ["--ref_img", DATA / "input.png", "--H", "64", "--W", "72", "--num_cols", "1"]
    assert outcome(main, *words, *reference, "--strength", "0.4", "--output_path", tmp_path)[0] == 0
    assert outcome(main, *words, *reference, "--ref_mask", DATA / "mask.png", "--output_path", tmp_path)[0] == 0
    changed, repainted = pictures(tmp_path)
    original = np.asarray(Image.open(DATA / "input.png").convert("RGB").resize((72, 64), Image.LANCZOS))
    same = (repainted == original).all(-1).mean()
    assert 0.2 < same < 0.95 and (changed != repainted).any()


def test_controlnet(words, tmp_path, outcome, standins_xl):
    hint = ["--control_image", DATA / "hint.png", "--num_cols", "1"]
    runs = [(main, []), (controlnet_sdxl.main, hint), (controlnet_sdxl.main, hint + ["--control_scale", "0"]),
            (main, hint + ["--controlnet", standins_xl["controlnet"]])]
    for script, flags in runs:
        status, said = outcome(script, *words, *flags, "--num_cols", "1", "--output_path", tmp_path)
        assert status == 0, said
    plain, controlled, silent, added = pictures(tmp_path)
    assert psnr(plain, controlled) < 50
    np.testing.assert_array_equal(plain, silent)
    np.testing.assert_array_equal(controlled, added)


def test_parts_are_read_when_they_are_needed(merged_xl):
    config = load_config(InferenceConfig, CONFIG).model
    config.num_head_channels = 32
    whole = build_model(merged_xl, config, extra=ExtraParts(controlnets=[None]), family=SDXL)
    staged = build_model(merged_xl, config, extra=ExtraParts(controlnets=[None]), staged=True,
                         family=SDXL)
    image = Image.open(DATA / "input.png").convert("RGB")
    for a, b in zip(*(model.conditions(image, [("a", "b")])[0] for model in (whole, staged))):
        np.testing.assert_array_equal(a.context.asnumpy(), b.context.asnumpy())
        np.testing.assert_array_equal(a.vector.asnumpy(), b.vector.asnumpy())
        assert a.context.shape == (1, 77 + 4, 192) and a.vector.shape == (1, 128 + 6 * 256)
    staged.start_denoising()
    assert not staged.diffusion.text_encoders and staged.embedder.image_encoder is None
    for cells in zip((whole.diffusion.unet, whole.diffusion.vae, whole.diffusion.controlnets[0]),
                     (staged.diffusion.unet, staged.diffusion.vae, staged.diffusion.controlnets[0])):
        for (path, a), (_, b) in zip(*(cell.parameters_and_names() for cell in cells)):
            np.testing.assert_array_equal(a.asnumpy(), b.asnumpy(), err_msg=path)


def test_unet_is_gone_when_the_last_picture_is_decoded(words, tmp_path, outcome, monkeypatch):
    seen, unets = [], []
    start, decode = ImagePromptModel.start_denoising, LatentDiffusion.decode

    def started(model):
        start(model)
        unets.append(weakref.ref(model.diffusion.unet))

    def decoded(diffusion, latents):
        seen.append(unets[-1]() is None)
        return decode(diffusion, latents)

    monkeypatch.setattr(ImagePromptModel, "start_denoising", started)
    monkeypatch.setattr(LatentDiffusion, "decode", decoded)
    for mode in ("1", "0"):
        status, said = outcome(main, *words, "--n_iter", "2", "--num_cols", "1", "--ms_mode", mode, "--output_path",
                               tmp_path)
        assert status == 0, said
    assert seen == [False, True] * 2


@pytest.mark.slow
def test_graphs_are_compiled_where_that_saves_time(words, tmp_path, outcome, monkeypatch):
    """They make the picture that is made operator by operator."""
    compiled, compile_ = [], LatentDiffusion.compile
    monkeypatch.setattr(LatentDiffusion, "compile", lambda diffusion: compiled.append(compile_(diffusion)))
    monkeypatch.setattr(run, "use_graphs", lambda *_: None)
    for positions in (1 << 30, 1):
        monkeypatch.setattr(run, "COMPILED_POSITIONS", positions)
        status, said = outcome(main, *words, "--num_cols", "1", "--output_path", tmp_path)
        assert status == 0, said
    assert len(compiled) == 1 and psnr(*pictures(tmp_path)) > 70


def test_the_tools(standins_xl, merged_xl, tmp_path, outcome):
    """A converted base merges to the same file as the original one; --skip_ip leaves the adapter out."""
    convert(standins_xl["base"], tmp_path / "base.ckpt")
    flags = [word for name, path in standins_xl.items() if name not in ("base", "ip_adapter")
             for word in (f"--{name}", path)]
    status, said = outcome(merge_ckpts_sdxl.main, "--sd_xl_base", tmp_path / "base.ckpt", *flags,
                           "--ip_adpater", standins_xl["ip_adapter"], "--out", tmp_path / "merged.ckpt")
    assert status == 0, said
    expected, got = arrays(merged_xl), arrays(tmp_path / "merged.ckpt")
    assert expected.keys() == got.keys() and "conditioner.embedders.1.model.logit_scale" in got
    assert all(np.array_equal(value, got[name]) for name, value in expected.items())
    merge(SDXL, **{**standins_xl, "ip_adapter": None}, out=tmp_path / "bare.ckpt", skip_ip=True)
    without = expected.keys() - arrays(tmp_path / "bare.ckpt").keys()
    assert len(without) == 4 and all(name.startswith("conditioner.embedders.2.image_proj.") for name in without)


def test_mistakes(words, merged, standins, standins_xl, tmp_path, outcome):
    (tmp_path / "in").mkdir()
    assert_mistakes(outcome, main, words, {
        "SD-1.5": (["--weight", merged], "is an SD-1.5 checkpoint, expected SDXL; use image_variation_sd.py"),
        "original": (["--weight", standins_xl["base"]], "is an original torch checkpoint.*merge_ckpts_sdxl.py"),
        "sampler": (["--sampler", "Euler"], "'Euler' is not known, expected EulerEDMSampler or"),
        "guider": (["--guider", "None"], "expected VanillaCFG or IdentityGuider"),
        "discretization": (["--discretization", "x"], "expected DiffusersDDPMDiscretization or"),
        "mask alone": (["--ref_mask", DATA / "mask.png"], "--ref_mask has nothing to act on; give --ref_img"),
        "strength alone": (["--strength", "0.5"], "--strength has nothing to act on; give --ref_img"),
        "controlnet": (["--control_image", DATA / "hint.png", "--controlnet", standins["controlnet"]],
                       "it was trained for another base model"),
        "adapter": (["--ip_adapter", standins["ip_adapter"]], "this adapter was trained with|for another base model"),
    }, tmp_path / "in")
