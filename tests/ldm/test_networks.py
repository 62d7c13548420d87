"""Every network against numbers recorded with diffusers and transformers on the stand-ins (tests/record)."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from PIL import Image

from ip_adapter.config import ModelConfig
from ip_adapter.images.preprocess import clip_pixels, hint_pixels, open_image
from ip_adapter.weights.loading import ExtraParts, build_model
from ldm.model import Condition, Control, GuidedDenoiser, Shortcuts
from ldm.modules.layers import GroupNorm
from tests.support.arrays import DATA, reference

PROMPTS = ["a red circle"]
NEGATIVE = ["monochrome, lowres, bad anatomy, worst quality, low quality"]


@pytest.fixture(scope="module")
def model(recorded):
    return build_model(recorded, ModelConfig(), extra=ExtraParts(controlnets=[None]))


@pytest.fixture(scope="module")
def shallow(merged_control):
    """Of fewer blocks, which compile sooner."""
    return build_model(merged_control, ModelConfig(), extra=ExtraParts(controlnets=[None]))


@pytest.fixture(scope="module")
def expected():
    return reference()


def assert_close(value, expected, tolerance=1e-4):
    """The largest difference is at most `tolerance` of the largest value."""
    value = np.asarray(value)
    assert value.shape == expected.shape
    assert np.abs(value - expected).max() <= tolerance * np.abs(expected).max()


def test_text_encoder(model, expected):
    assert_close(model.diffusion.encode_text(PROMPTS).context.asnumpy(), expected["text_cond"])
    assert_close(model.diffusion.encode_text(NEGATIVE).context.asnumpy(), expected["text_uncond"])


def test_picture_input(expected):
    assert_close(clip_pixels(open_image(DATA / "input.png"))[None], expected["pixel_values"], 1e-6)


def test_image_encoder_and_projector(model, expected):
    pixels = Tensor(expected["pixel_values"])
    assert_close(model.embedder.image_encoder(pixels).asnumpy(), expected["image_embedding"])
    tokens, uncond = model.embedder.project(model.embedder.image_encoder(pixels))
    assert_close(tokens.asnumpy(), expected["image_tokens_cond"])
    assert_close(uncond.asnumpy(), expected["image_tokens_uncond"])


def context(expected, n: int) -> Tensor:
    sides = [np.concatenate([expected[f"text_{side}"], expected[f"image_tokens_{side}"]], 1)
             for side in ("uncond", "cond")]
    return Tensor(np.concatenate([np.repeat(side, n, 0) for side in sides]))


@pytest.mark.parametrize("times", [1, 2])
def test_unet_with_image_branch_at_an_odd_size(model, expected, times):
    """Both halves of the guidance as a batch of four latents, or as two that the UNet itself takes twice."""
    latents = np.concatenate([np.load(DATA / "sd_latents.npy")] * (2 // times))
    model.set_ip_scale(0.8)
    noise = model.diffusion.unet(Tensor(latents), Tensor([float(expected["timestep"])] * len(latents)),
                                 context(expected, 2))
    assert_close(noise.asnumpy(), expected["unet_output"])


def test_both_halves_are_one_until_the_context_comes_in(model, expected):
    """The first residual block and self-attention are given two latents for a context of four, the next block four."""
    seen, blocks = [], model.diffusion.unet.input_blocks
    watched = [blocks[1].cell_list[0], blocks[1].cell_list[1].transformer_blocks[0].attn1, blocks[2].cell_list[0]]
    hooks = [cell.register_forward_pre_hook(lambda cell, inputs: seen.append(len(inputs[0]))) for cell in watched]
    latents = Tensor(np.load(DATA / "sd_latents.npy"))
    model.diffusion.guided(latents, Tensor(500.0, ms.float32), context(expected, 2), Tensor(7.5, ms.float32))
    for hook in hooks:
        hook.remove()
    assert seen == [2, 2, 4]


def embedded_hint(model) -> Tensor:
    return model.diffusion.controlnets[0].embed_hint(Tensor(hint_pixels(open_image(DATA / "hint.png"))))


@pytest.fixture
def hint(model) -> Tensor:
    return embedded_hint(model)


def test_controlnet_sees_the_text_only(model, expected, hint):
    latents = np.load(DATA / "sd_latents.npy")
    text = np.concatenate([np.repeat(expected[f"text_{side}"], 2, 0) for side in ("uncond", "cond")])
    residuals = model.diffusion.controlnets[0](
        Tensor(np.concatenate([latents, latents])), Tensor([float(expected["timestep"])] * 4), Tensor(text), hint,
        Tensor(1.0, ms.float32))
    names = [f"control_down_{i}" for i in range(12)] + ["control_mid"]
    assert len(residuals) == len(names)
    for name, residual in zip(names, residuals):
        assert_close(residual.asnumpy(), expected[name])


def test_unet_with_a_controlnet(model, expected, hint):
    """Recorded with the image prompt at 0.8 and the ControlNet at 0.9; guidance joins the two halves of the batch."""
    latents, timestep = Tensor(np.load(DATA / "sd_latents.npy")), int(expected["timestep"])
    model.set_ip_scale(0.8)
    both = context(expected, 2)
    control = Control(hint, 0.9, {timestep})
    denoise = model.diffusion.denoiser(Condition(both[2:]), Condition(both[:2]), 7.5, [control])
    noise = denoise(latents, timestep).asnumpy()
    uncond, cond = np.split(expected["unet_control_output"], 2)
    assert_close(noise, uncond + 7.5 * (cond - uncond))
    without = denoise(latents, timestep - 1).asnumpy()
    assert np.abs(without - noise).max() > 0.01


def test_controlnets_add_up(model, expected, hint):
    latents, timestep = Tensor(np.load(DATA / "sd_latents.npy")), int(expected["timestep"])
    controlnet, both = model.diffusion.controlnets[0], context(expected, 2)
    twice = GuidedDenoiser(model.diffusion.unet, [controlnet, controlnet])
    once = GuidedDenoiser(model.diffusion.unet, [controlnet])
    words = (latents, Tensor(float(timestep), ms.float32), both, Tensor(7.5, ms.float32), None, both[:, :77])
    a, *_ = twice(*words, Tensor(np.concatenate([hint.asnumpy()] * 2)), Tensor([0.5, 0.25], ms.float32))
    b, *_ = once(*words, hint, Tensor([0.75], ms.float32))
    assert_close(a.asnumpy(), b.asnumpy(), 1e-5)


def test_norm_groups_of_the_configuration_reach_every_norm(merged_control):
    """Of UNet, ControlNet and autoencoder."""
    model = build_model(merged_control, ModelConfig(norm_groups=4), extra=ExtraParts(controlnets=[None]))
    networks = model.diffusion.unet, model.diffusion.controlnets[0], model.diffusion.vae
    for network in networks:
        assert {cell.groups for _, cell in network.cells_and_names() if isinstance(cell, GroupNorm)} == {4}


def test_autoencoder(model, expected):
    latents = Tensor(expected["latents"][:1] / np.float32(0.18215))
    assert_close(model.diffusion.vae(latents).asnumpy(), expected["decoded"].reshape(1, 3, 72, 104))
    image = Image.open(DATA / "input.png").convert("RGB").resize((104, 72), Image.BICUBIC)
    pixels = (np.asarray(image, np.float32) / 127.5 - 1).transpose(2, 0, 1)[None]
    assert_close(model.diffusion.encode_image(pixels).asnumpy(), expected["posterior_mean"] * 0.18215)


def test_guidance_1_is_the_conditional_output(model, expected):
    latents = Tensor(np.load(DATA / "sd_latents.npy"))
    both = context(expected, 2)
    cond, uncond = Condition(both[2:]), Condition(both[:2])
    alone = model.diffusion.denoiser(cond, uncond, 1.0)(latents, 500).asnumpy()
    scale = Tensor(1.0, ms.float32)
    guided = model.diffusion.guided(latents, Tensor(500.0, ms.float32), both, scale)[0].asnumpy()
    assert_close(guided, alone, 1e-5)
    np.testing.assert_allclose(model.diffusion.denoiser(cond, cond, 7.5)(latents, 500).asnumpy(), alone, atol=1e-4)


@pytest.mark.parametrize("mode", [ms.PYNATIVE_MODE, pytest.param(ms.GRAPH_MODE, marks=pytest.mark.slow)])
def test_kept_features_give_the_same_noise(shallow, expected, mode):
    """Where they are those of the very latents and timestep; their conditional half serves a step without guidance."""
    latents, both = Tensor(np.load(DATA / "sd_latents.npy")), context(expected, 2)
    steady = Tensor(500.0, ms.float32), Tensor(7.5, ms.float32)
    control = [embedded_hint(shallow), Tensor([0.9], ms.float32)]
    guided = GuidedDenoiser(shallow.diffusion.unet, shallow.diffusion.controlnets)

    def ask(side, *more):
        return guided(latents, steady[0], side, steady[1], None, *more)

    ms.set_context(mode=mode)
    try:
        for controls in ([None, None, None], [both[:, :77], *control]):
            noise, deep, residual = ask(both, *controls)
            assert_close(ask(both, None, None, None, deep, residual)[0].asnumpy(), noise.asnumpy(), 1e-5)
            if mode == ms.GRAPH_MODE:
                return  # each further call compiles, and nothing else
        alone = ask(both[2:], both[2:, :77], *control)[0].asnumpy()
        assert_close(ask(both[2:], None, None, None, deep[2:], residual[-2:])[0].asnumpy(), alone, 1e-5)
        assert np.abs(noise.asnumpy() - alone).max() > 0.01
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)


def test_shortcuts(model, expected):
    """What is left out at which timestep, and that features are made anew where too few are kept."""
    latents, both = Tensor(np.load(DATA / "sd_latents.npy")), context(expected, 2)
    cond, uncond = Condition(both[2:]), Condition(both[:2])

    def noises(shortcuts=Shortcuts(), scale=7.5):
        denoise = model.diffusion.denoiser(cond, uncond, scale, (), shortcuts)
        return [denoise(latents, t).asnumpy() for t in (500.0, 400.0, 300.0)]

    guided, alone = noises(), noises(scale=1.0)
    a, b, c = noises(Shortcuts(unguided=frozenset({400.0})))
    for noise, same in ((a, guided[0]), (b, alone[1]), (c, guided[2])):
        assert_close(noise, same, 1e-5)
    a, b, c = noises(Shortcuts(shallow=frozenset({500.0, 400.0})))
    assert_close(a, guided[0], 1e-5)  # nothing was kept yet
    assert np.abs(b - guided[1]).max() > 1e-3
    assert_close(c, guided[2], 1e-5)
    a, b, c = noises(Shortcuts(frozenset({500.0}), frozenset({400.0})))  # one side is kept, two are needed
    assert_close(b, guided[1], 1e-5)
