"""Sizes read off shapes that no network has: a config, None or one line, and quickly."""
from __future__ import annotations

import time
from dataclasses import replace

import pytest

from ip_adapter.config import ModelConfig
from ip_adapter.weights.dummy import MINIATURE, MINIATURE_XL
from ip_adapter.weights.parts import ModelSizes, check_sizes
from ldm.checkpoints.file import CheckpointError, CheckpointFile, TensorInfo
from ldm.checkpoints.formats.index import Entry
from ldm.checkpoints.layout import Layout
from ldm.checkpoints.loading import MAX_COUNT, Part, View, check
from ldm.checkpoints.names import VAE_TORCH
from ldm.errors import UserError
from tests.support.architectures import LAYOUTS, READERS, SHAPES, tensors_of

ODD = [(), (0,), (5,), (0, 0), (0, 8), (8, 0), (7, 5), (3, 3, 3), (0, 4, 3, 3), (7, 4, 3, 3), (1,) * 6, (2**40, 2**19)]


def sizes(part: str, tensors: dict):
    """What is read off `tensors`, or the one line it is refused with."""
    try:
        return READERS[part](View(tensors, LAYOUTS[part]))
    except UserError as error:
        assert "\n" not in str(error) and "expected" in str(error)
        return str(error)


def test_the_right_shapes_give_their_sizes():
    found = {part: sizes(part, tensors_of(LAYOUTS[part], shapes)) for part, shapes in SHAPES.items()}
    unet, vae = found["unet"], found["vae"]
    assert (unet.in_channels, unet.model_channels, unet.channel_mult, unet.num_res_blocks) == (4, 8, (1, 2), 1)
    assert (unet.transformer_depth, unet.middle_depth, unet.context_dim, unet.use_linear) == ((1, 0), 1, 6, True)
    assert (unet.adm_in_channels, unet.out_channels) == (10, 4)
    assert (vae.channels, vae.channel_mult, vae.num_res_blocks, vae.latent_channels) == (8, (1, 2, 2, 2), 1, 4)
    assert (found["text"].width, found["text"].layers, found["text"].vocab_size) == (8, 1, 49)
    assert (found["image"].image_size, found["image"].embed_dim, found["image"].mlp_width) == (28, 7, 64)
    assert found["proj"] == (7, 6, 4)


@pytest.mark.parametrize("part", SHAPES)
def test_odd_shapes_end_in_no_traceback(part):
    right = tensors_of(LAYOUTS[part], SHAPES[part])
    for name in right:
        for shape in ODD:
            sizes(part, {**right, name: TensorInfo(shape, "float32")})  # raises nothing but what it catches
        sizes(part, {other: info for other, info in right.items() if other != name})


@pytest.mark.parametrize("part, path", [
    ("unet", "input_blocks.0.0.weight"), ("unet", "input_blocks.1.0.in_layers.2.weight"),
    ("unet", "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"), ("vae", "decoder.conv_in.weight"),
    ("text", "token_embedding"), ("text", "positional_embedding"),
    ("image", "conv1.weight"), ("image", "proj"), ("proj", "proj.weight"), ("proj", "norm.gamma")])
@pytest.mark.parametrize("shape", [(), (0,), (3,) * 5, (0, 8, 3, 3)])
def test_a_part_of_another_shape_is_absent(part, path, shape):
    tensors = tensors_of(LAYOUTS[part], SHAPES[part])
    tensors[LAYOUTS[part].source(path).names[0]] = TensorInfo(shape, "float32")
    assert sizes(part, tensors) is None


@pytest.mark.parametrize("part, pattern, shape", [
    ("unet", "input_blocks.1.1.transformer_blocks.{}.norm1.gamma", (8,)),
    ("unet", "middle_block.1.transformer_blocks.{}.norm1.gamma", (8,)),
    ("unet", "input_blocks.{}.0.in_layers.2.weight", (8, 8, 3, 3)),
    ("vae", "encoder.down.{}.block.0.conv1.weight", (8, 8, 3, 3)),
    ("vae", "encoder.down.0.block.{}.conv1.weight", (8, 8, 3, 3)),
    ("text", "transformer.resblocks.{}.ln_1.gamma", (8,)), ("image", "transformer.resblocks.{}.ln_1.gamma", (16,))])
def test_thousands_of_blocks_are_refused_at_once(part, pattern, shape):
    layout, began = LAYOUTS[part], time.monotonic()
    tensors = tensors_of(layout, {pattern.format(n): shape for n in range(3000)})
    said = sizes(part, {**tensors, **tensors_of(layout, SHAPES[part])})
    assert f"expected at most {MAX_COUNT}" in said or "expected 4" in said, said
    assert time.monotonic() - began < 5


def test_an_autoencoder_halves_the_picture_three_times():
    down = {f"encoder.down.{i}.block.0.conv1.weight": (8, 8, 3, 3) for i in range(10)}
    assert "has 10 levels, expected 4" in sizes("vae", tensors_of(VAE_TORCH, {**SHAPES["vae"], **down}))


def test_stacked_tensors_have_to_be_alike():
    layout = Layout("", stacked=(r"\.qkv$", (".q", ".k", ".v")))
    for shapes in ([(), (), ()], [(2, 4), (), (2, 4)], [(2, 4), (3, 4), (1, 4)]):
        tensors = {f"a.{letter}": TensorInfo(shape, "float32") for letter, shape in zip("qkv", shapes)}
        assert View(tensors, layout).shape("a.qkv") is None
        file = CheckpointFile("x.safetensors", None, {name: Entry(info, ()) for name, info in tensors.items()})
        with pytest.raises(CheckpointError, match=r"1 of another shape: a\.q .*, expected \(6, 4\)"):
            check([Part({"a.qkv": (6, 4)}, file, layout)])


@pytest.mark.parametrize("key, value", [
    ("num_heads", 3), ("num_heads", 0), ("num_heads", -2), ("num_heads", -1), ("norm_groups", 0), ("norm_groups", 5),
    ("norm_groups", -1), ("norm_groups", 64), ("image_heads", 0), ("image_heads", 5), ("num_head_channels", 0),
    ("num_head_channels", 12), ("num_head_channels", -7)])
def test_heads_and_groups_have_to_divide_the_channels(key, value):
    check_sizes(MINIATURE, ModelConfig())
    with pytest.raises(UserError, match=rf"model\.{key} is {value}, but .* has \d+ channels, expected a positive"):
        check_sizes(MINIATURE, replace(ModelConfig(), **{key: value}))


def test_heads_by_their_width():
    check_sizes(MINIATURE_XL, ModelConfig(num_heads=-1, num_head_channels=32))
    with pytest.raises(UserError, match=r"model\.num_head_channels is 128, but the UNet's attention has 64 channels"):
        check_sizes(MINIATURE_XL, ModelConfig(num_heads=-1, num_head_channels=128))
    check_sizes(ModelSizes(None, None, (), None, None), ModelConfig(num_heads=0))  # absent parts are named elsewhere
