"""Merging and converting: names, values, and files that do not belong."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from mindspore.nn.utils import no_init_parameters

from ip_adapter.config import ModelConfig
from ip_adapter.families import SD15
from ip_adapter.weights.dummy import MINIATURE, write_standins
from ip_adapter.weights.loading import build_model
from ip_adapter.weights.merging import convert, merge
from ldm.checkpoints.file import CheckpointError, open_checkpoint, save_arrays
from ldm.checkpoints.loading import Part, parameter_shapes, plan
from ldm.checkpoints.names import CONTROLNET_DIFFUSERS, CONTROLNET_TORCH
from ldm.modules.controlnet import ControlNet
from tests.support.arrays import DATA, arrays
from tests.support.dummies import merged_file


def manifest_names(name: str) -> set:
    return {line.split("\t")[0] for line in (DATA / "manifests" / f"{name}.tsv").read_text().splitlines()}


def without(names: set, *parts: str) -> set:
    """Names of layers that small and full-size networks both have."""
    return {name for name in names if not any(part in name for part in parts)}


DEEPER = tuple(f"resblocks.{i}." for i in range(2, 48))


@pytest.fixture(scope="module")
def standins(standins_recorded) -> dict:
    """Those with all blocks of SD-1.5, whose names the manifests have."""
    return standins_recorded


@pytest.fixture(scope="module")
def merged(standins, tmp_path_factory):
    return merged_file(tmp_path_factory.mktemp("merged"), {**standins, "controlnet": None})


@pytest.fixture(scope="module")
def merged_control(recorded):
    return recorded


@pytest.mark.parametrize("fixture, manifest", [("merged", "sd_v1.5_ip_adapter.ckpt"),
                                               ("merged_control", "sd_v1.5_ip_adapter.controlnet.ckpt")])
def test_merged_names_are_those_of_the_public_layout(fixture, manifest, request):
    with open_checkpoint(request.getfixturevalue(fixture)) as file:
        assert set(file.tensors) == without(manifest_names(manifest), *DEEPER)


def test_merged_values(merged_control, standins):
    out, sd, adapter = arrays(merged_control), arrays(standins["base"]), arrays(standins["ip_adapter"])
    encoder, vae = arrays(standins["open_clip_vit"]), arrays(standins["vae"])
    unet = "model.diffusion_model."
    np.testing.assert_array_equal(out[unet + "input_blocks.1.0.in_layers_conv.conv.weight"],
                                  sd[unet + "input_blocks.1.0.in_layers.2.weight"])
    text = "cond_stage_model.transformer."
    np.testing.assert_array_equal(
        out[text + "transformer_layer.resblocks.1.attn.attn.in_proj.bias"],
        np.concatenate([sd[f"{text}text_model.encoder.layers.1.self_attn.{k}_proj.bias"] for k in "qkv"]))
    np.testing.assert_array_equal(out["embedder.image_encoder.model.visual.proj"],
                                  encoder["visual_projection.weight"].T)
    np.testing.assert_array_equal(out["first_stage_model.decoder.mid.attn_1.k.weight"][:, :, 0, 0],
                                  vae["decoder.mid_block.attentions.0.key.weight"])
    np.testing.assert_array_equal(out["first_stage_model.decoder.up.3.block.0.conv1.weight"],
                                  vae["decoder.up_blocks.0.resnets.0.conv1.weight"])
    np.testing.assert_array_equal(out[unet + "middle_block.1.transformer_blocks.0.attn2.to_v_ip.weight"],
                                  adapter["ip_adapter.31.to_v_ip.weight"])
    control = arrays(standins["controlnet"])
    for ours, theirs in (("input_hint_block.14.conv", "controlnet_cond_embedding.conv_out"),
                         ("zero_convs.11.conv", "controlnet_down_blocks.11"),
                         ("input_blocks.8.0.in_layers_conv.conv", "down_blocks.2.resnets.1.conv1")):
        np.testing.assert_array_equal(out[f"{unet}controlnet.{ours}.weight"], control[f"{theirs}.weight"])


def original_controlnet(standins) -> dict:
    """The ControlNet as lllyasviel's original files have it."""
    with no_init_parameters():
        shapes = parameter_shapes(ControlNet(MINIATURE.unet))
    with open_checkpoint(standins["controlnet"]) as file:
        return {f"control_model.{name}": read() for name, (_, read) in plan(
            Part(shapes, file, CONTROLNET_DIFFUSERS), CONTROLNET_TORCH[1]).items()}


def test_original_controlnets_merge_to_the_same(merged_control, standins, tmp_path):
    """Those of version 1.1, those with the whole model around them, those without a prefix, and merged ones."""
    original, expected = original_controlnet(standins), arrays(merged_control)
    bare = {name[len("control_model."):]: value for name, value in original.items()}
    files = {"v11": original, "whole": {**original, **arrays(standins["base"])}, "bare": bare, "merged": expected}
    for name, tensors in files.items():
        save_arrays(tmp_path / f"{name}.safetensors", tensors)
        merge(SD15, **{**standins, "controlnet": tmp_path / f"{name}.safetensors"}, out=tmp_path / "out.ckpt")
        out = arrays(tmp_path / "out.ckpt")
        assert out.keys() == expected.keys()
        for key in out:
            np.testing.assert_array_equal(out[key], expected[key], err_msg=f"{name}: {key}")


def test_without_an_adapter_training_starts_from_the_text_attention(standins, tmp_path):
    out = tmp_path / "train.safetensors"
    files = {key: path for key, path in standins.items() if key not in ("ip_adapter", "controlnet")}
    merge(SD15, **files, ip_adapter=None, out=out, skip_ip=True)
    tensors = arrays(out)
    assert not [name for name in tensors if "image_proj" in name]
    block = "model.diffusion_model.output_blocks.3.1.transformer_blocks.0.attn2."
    np.testing.assert_array_equal(tensors[block + "to_k_ip.weight"], tensors[block + "to_k.weight"])
    with pytest.raises(CheckpointError, match="holds no IP-Adapter"):
        build_model(out, ModelConfig())


def test_converting_first_gives_the_same(merged_control, standins, tmp_path):
    base = tmp_path / "sd_v1.5-d0ab7146.ckpt"
    convert(standins["base"], base)
    with open_checkpoint(base) as file:
        assert set(file.tensors) == without(manifest_names("sd_v1.5-d0ab7146.ckpt"), *DEEPER)
    out = tmp_path / "merged.ckpt"
    merge(SD15, **{**standins, "base": base}, out=out)
    expected = arrays(merged_control)
    for name, value in arrays(out).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def test_float16_and_a_finetuned_adapter(merged, standins, tmp_path):
    whole = arrays(merged)
    finetuned = tmp_path / "sd-1.ckpt"
    save_arrays(finetuned, {name: value for name, value in whole.items() if "_ip." in name or "image_proj" in name})
    out = tmp_path / "half.ckpt"
    merge(SD15, **{**standins, "ip_adapter": finetuned, "controlnet": None}, out=out, dtype="float16")
    for name, value in arrays(out).items():
        assert value.dtype == np.float16
        np.testing.assert_array_equal(value, whole[name].astype(np.float16))


def test_what_does_not_fit_is_named(standins, tmp_path):
    other = write_standins(tmp_path / "other", replace(MINIATURE, image=replace(MINIATURE.image, embed_dim=48),
                                                          proj=MINIATURE.proj._replace(embed_dim=48)))
    wide = write_standins(tmp_path / "wide", replace(MINIATURE, unet=replace(MINIATURE.unet, context_dim=64)))
    out = tmp_path / "out.ckpt"
    cases = [
        ({"ip_adapter": other["ip_adapter"]}, "trained with an encoder of width 48; the encoder given is of width 32"),
        ({"ip_adapter": standins["vae"]}, "holds no adapter"),
        ({"base": standins["vae"]}, "not a whole model"),
        ({"open_clip_vit": standins["base"]}, "holds no image encoder"),
        ({"vae": standins["open_clip_vit"]}, "--vae .*holds no autoencoder; expected that of diffusers"),
        ({"controlnet": standins["vae"]}, "--controlnet .*holds no ControlNet; expected lllyasviel's"),
        ({"controlnet": standins["base"]}, "--controlnet .*holds no ControlNet"),
        ({"controlnet": wide["controlnet"]}, r"is for a UNet of 32 x .* and text of width 64; .* and 128"),
        ({"vae": tmp_path / "absent.safetensors"}, "absent.safetensors"),
    ]
    for change, message in cases:
        with pytest.raises(CheckpointError, match=message):
            merge(SD15, **{**standins, **change}, out=out)
        assert not out.exists() and not list(tmp_path.glob(".*"))


def test_damaged_weights_are_refused(standins, tmp_path):
    tensors = arrays(standins["ip_adapter"])
    tensors["ip_adapter.5.to_k_ip.weight"][3, 4] = np.nan
    save_arrays(tmp_path / "nan.safetensors", tensors)
    out = tmp_path / "out.ckpt"
    out.write_bytes(b"the old file")
    with pytest.raises(CheckpointError, match="ip_adapter.5.to_k_ip.weight holds NaN"):
        merge(SD15, **{**standins, "ip_adapter": tmp_path / "nan.safetensors"}, out=out)
    assert out.read_bytes() == b"the old file"


def test_plus_adapters_are_not_mistaken_for_plain_ones(standins, tmp_path):
    tensors = arrays(standins["ip_adapter"])
    plus = {name: value for name, value in tensors.items() if not name.startswith("image_proj")}
    save_arrays(tmp_path / "plus.safetensors", {**plus, "image_proj.latents": np.zeros((1, 16, 8), np.float32)})
    with pytest.raises(CheckpointError, match="is a Plus adapter .*only plain adapters"):
        merge(SD15, **{**standins, "ip_adapter": tmp_path / "plus.safetensors"}, out=tmp_path / "out.ckpt")


def test_a_merged_file_may_be_merged_again(merged_control, standins, tmp_path):
    """With another adapter, and without what it held beyond the base: as a merge of the files it came from."""
    other = write_standins(tmp_path / "other", MINIATURE, seed=2)["ip_adapter"]
    for name, sources in (("again", {"base": merged_control, "vae": None, "open_clip_vit": merged_control}),
                          ("first", {})):
        merge(SD15, **{**standins, **sources, "ip_adapter": other, "controlnet": None}, out=tmp_path / f"{name}.ckpt")
    again, first = arrays(tmp_path / "again.ckpt"), arrays(tmp_path / "first.ckpt")
    assert again.keys() == first.keys()
    for name, value in again.items():
        np.testing.assert_array_equal(value, first[name], err_msg=name)
