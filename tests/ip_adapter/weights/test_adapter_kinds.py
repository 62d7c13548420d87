"""Adapters in every file they come in: found by their names, or named for what they are."""
from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
from mindspore.nn.utils import no_init_parameters

from ip_adapter.families import SD15, SDXL
from ip_adapter.weights.merging import merge
from ip_adapter.weights.parts import adapter_layouts, find_adapter, kind_of_adapter
from ldm.checkpoints.file import CheckpointError, TensorInfo, save_arrays
from ldm.modules.unet import UNetConfig, UNetModel
from tests.support.arrays import arrays, assert_equal

XL = UNetConfig(channel_mult=(1, 2, 4), transformer_depth=(0, 2, 10), middle_depth=10, context_dim=2048, num_heads=-1,
                num_head_channels=64, use_linear=True, adm_in_channels=2816)
# A network's path, its number in an adapter, and diffusers' path (attn_processors of a UNet2DConditionModel).
COUNTED = {
    "SD-1.5": [("input_blocks.1.1.transformer_blocks.0", 1, "down_blocks.0.attentions.0.transformer_blocks.0"),
               ("input_blocks.8.1.transformer_blocks.0", 11, "down_blocks.2.attentions.1.transformer_blocks.0"),
               ("output_blocks.3.1.transformer_blocks.0", 13, "up_blocks.1.attentions.0.transformer_blocks.0"),
               ("output_blocks.11.1.transformer_blocks.0", 29, "up_blocks.3.attentions.2.transformer_blocks.0"),
               ("middle_block.1.transformer_blocks.0", 31, "mid_block.attentions.0.transformer_blocks.0")],
    "SDXL": [("input_blocks.4.1.transformer_blocks.1", 3, "down_blocks.1.attentions.0.transformer_blocks.1"),
             ("input_blocks.8.1.transformer_blocks.9", 47, "down_blocks.2.attentions.1.transformer_blocks.9"),
             ("output_blocks.0.1.transformer_blocks.0", 49, "up_blocks.0.attentions.0.transformer_blocks.0"),
             ("output_blocks.5.1.transformer_blocks.1", 119, "up_blocks.1.attentions.2.transformer_blocks.1"),
             ("middle_block.1.transformer_blocks.9", 139, "mid_block.attentions.0.transformer_blocks.9")]}


@pytest.mark.parametrize("family, config", [(SD15, UNetConfig()), (SDXL, XL)])
def test_layers_are_counted_as_in_tencents_training(family, config):
    with no_init_parameters():
        layouts = adapter_layouts(UNetModel(config), family)
    for path, number, diffusers in COUNTED[family.name]:
        for devices, wrapped in (("", ""), (" by several devices", "module.")):
            counted, proj = layouts[f"trained{devices}"]
            inside = layouts[f"trained{devices}, attention in the UNet"][0]
            key = f"{path}.attn2.to_k_ip.weight"
            assert counted.source(key).names == (f"{wrapped}adapter_modules.{number}.to_k_ip.weight",)
            assert inside.source(key).names == (f"{wrapped}unet.{diffusers}.attn2.processor.to_k_ip.weight",)
            assert proj.source("norm.gamma").names == (f"{wrapped}image_proj_model.norm.weight",)


@pytest.mark.parametrize("wrapped", ["", "module."])
@pytest.mark.parametrize("inside", [False, True])
def test_a_training_checkpoint_merges_like_the_adapter_it_became(standins, tmp_path, wrapped, inside):
    published = arrays(standins["ip_adapter"])
    # Of a UNet of two levels: its only attention is in the second; see `shallow`.
    diffusers = {1: "down_blocks.1.attentions.0", 3: "down_blocks.1.attentions.1", 5: "up_blocks.0.attentions.0",
                 7: "up_blocks.0.attentions.1", 9: "up_blocks.0.attentions.2", 11: "mid_block.attentions.0"}
    trained = {"unet.conv_in.weight": np.ones((4, 4), np.float32),
               "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": np.ones(3, np.float32)}
    for name, value in published.items():
        kind, number, rest = name.split(".", 2)
        if kind == "image_proj":
            trained[f"image_proj_model.{number}.{rest}"] = value
        else:
            trained[f"unet.{diffusers[int(number)]}.transformer_blocks.0.attn2.processor.{rest}"] = value
            trained.update({} if inside else {f"adapter_modules.{number}.{rest}": value})
    save_arrays(tmp_path / "model.safetensors", {wrapped + name: value for name, value in trained.items()})
    merged = []
    for file in (standins["ip_adapter"], tmp_path / "model.safetensors"):
        merged.append(tmp_path / f"{len(merged)}.ckpt")
        merge(SD15, **{**standins, "controlnet": None, "ip_adapter": file}, out=merged[-1])
    assert_equal(arrays(merged[1]), arrays(merged[0]))


FACE = {"proj.0.weight": (1024, 512), "proj.2.weight": (3072, 1024), "norm.weight": (768,)}
ATTENTION = {"ip_adapter.1.to_k_ip.weight": (320, 768)}
KINDS = {
    "a Plus adapter": {"image_proj.latents": (1, 16, 768), "image_proj.proj_in.weight": (768, 1280)},
    "an InstantID or FaceID portrait-unnorm": {"image_proj.latents": (1, 16, 1280),
                                               "image_proj.proj_in.weight": (1280, 512)},
    "a full-face adapter": {"image_proj.proj.0.weight": (1280, 1280), "image_proj.proj.3.weight": (768,)},
    "a FaceID adapter": {f"image_proj.{name}": shape for name, shape in FACE.items()},
    "a FaceID portrait adapter": {f"image_proj.{name}": shape for name, shape in
                                  {**FACE, "proj.2.weight": (12288, 1024)}.items()},
    "a FaceID-Plus or FaceID-PlusV2": {**{f"module.image_proj_model.{name}": shape for name, shape in FACE.items()},
                                       "module.image_proj_model.perceiver_resampler.proj_in.weight": (768, 1280)},
    "projector (image_proj.) has impossible sizes": {"image_proj.proj.weight": (7,), "image_proj.norm.weight": (768,)},
    "half an adapter, without its projector": {},
    "a LoRA": {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (16, 320)},
    "a T2I-Adapter": {"adapter.body.0.resnets.0.block1.bias": (320,)},
    "a ControlNet": {"controlnet_down_blocks.0.weight": (320, 320, 1, 1)},
    "a whole model": {"model.diffusion_model.out.2.bias": (4,)},
    "": {"decoder.conv_in.weight": (512, 4, 3, 3)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_files_are_named_for_what_they_are(kind):
    beside = ATTENTION if "image_proj" in str(KINDS[kind]) or kind.startswith("half") else {}
    tensors = {name: TensorInfo(shape, "float16") for name, shape in {**KINDS[kind], **beside}.items()}
    said = kind_of_adapter(tensors)
    assert kind in said and bool(kind) == bool(said)
    for name in tensors:  # odd shapes change the answer at most
        for shape in ((), (0,), (0, 0), (1, 2, 3)):
            kind_of_adapter({**tensors, name: TensorInfo(shape, "float16")})
    with no_init_parameters():
        unet = UNetModel(UNetConfig(model_channels=32))
    expected = f"is .*{re.escape(kind)}.* only plain adapters" if kind else "holds no adapter"
    with pytest.raises(CheckpointError, match=f"--ip_adapter x.bin: {expected}"):
        find_adapter(SimpleNamespace(path="x.bin", tensors=tensors), unet, 1024, SD15)
