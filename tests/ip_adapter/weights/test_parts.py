"""Files as people have them: taken where they hold what is needed, refused by name where they are of another kind."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mindspore import Tensor

from ip_adapter.config import ModelConfig
from ip_adapter.data.features import FrozenEncoders
from ip_adapter.families import SD15, SDXL, Family
from ip_adapter.weights.dummy import write_clip_standin
from ip_adapter.weights.loading import ExtraParts, build_model
from ip_adapter.weights.merging import convert, merge
from ip_adapter.weights.parts import merged_sizes
from ldm.checkpoints.file import CheckpointError, open_checkpoint, save_arrays
from tests.support.arrays import arrays
from tests.support.checkpoints import write_trainer_file
from tests.support.dummies import SHALLOW

UNET, TEXT = "model.diffusion_model.", "cond_stage_model.transformer."
TEXT_XL = "conditioner.embedders.0.transformer."


def merged_arrays(family: Family, folder: Path, files: dict) -> dict:
    merge(family, **files, out=folder / "out.safetensors")
    return arrays(folder / "out.safetensors")


def assert_equal(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


IDLE = {
    "model_ema.decay": np.float32(1), "model_ema.num_updates": np.int32(1), "lvlb_weights": np.ones(4, np.float32),
    "embedding_manager.string_to_param_dict.*": np.ones((1, 8), np.float32), "denoiser.sigmas": np.ones(4, np.float32),
    "betas": np.ones(4, np.float64), "conditioner.embedders.0.logit_scale": np.float32(1),
    "conditioner.embedders.0.transformer.text_projection.weight": np.ones((4, 4), np.float32),
    "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": np.arange(77)[None],
    "cond_stage_model.logit_scale": np.float32(1),
    "cond_stage_model.transformer.text_projection.weight": np.ones((4, 4), np.int8),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": np.arange(77)[None]}


@pytest.mark.parametrize("family, fixture", [(SD15, "standins"), (SDXL, "standins_xl")])
def test_what_other_tools_leave_in_a_base_is_dropped(family, fixture, request, tmp_path):
    """From original files and from those under MindSpore names."""
    files = {**request.getfixturevalue(fixture), "controlnet": None}
    expected = merged_arrays(family, tmp_path, files)
    other = "conditioner." if family is SD15 else "cond_stage_model."
    idle = {name: value for name, value in IDLE.items() if not name.startswith(other)}
    convert(files["base"], tmp_path / "ms.safetensors")
    for base in (files["base"], tmp_path / "ms.safetensors"):
        save_arrays(tmp_path / "base.safetensors", {**arrays(base), **idle})
        assert_equal(merged_arrays(family, tmp_path, {**files, "base": tmp_path / "base.safetensors"}), expected)
    save_arrays(tmp_path / "base.safetensors", {**arrays(files["base"]), "embedding_other.w": np.ones(1, np.float32)})
    with pytest.raises(CheckpointError, match="1 unexpected: embedding_other.w"):
        merge(family, **{**files, "base": tmp_path / "base.safetensors"}, out=tmp_path / "no.ckpt")


def test_a_merged_file_with_idle_tensors_is_built(merged, tmp_path):
    idle = {name: value for name, value in IDLE.items() if not name.startswith("conditioner.")}
    save_arrays(tmp_path / "x.safetensors", {**arrays(merged), **idle})
    model = build_model(tmp_path / "x.safetensors", ModelConfig())
    np.testing.assert_array_equal(model.diffusion.unet.out[2].bias.asnumpy(), arrays(merged)[f"{UNET}out.2.conv.bias"])


def test_trainers_files_are_taken(standins, tmp_path):
    expected = merged_arrays(SD15, tmp_path, standins)
    files = dict(standins)
    for part in ("base", "vae", "controlnet"):
        files[part] = tmp_path / f"{part}.ckpt"
        write_trainer_file(files[part], arrays(standins[part]))
    assert_equal(merged_arrays(SD15, tmp_path, files), expected)


def test_a_whole_clip_as_image_encoder(standins, tmp_path):
    files = {**standins, "controlnet": None}
    expected = merged_arrays(SD15, tmp_path, files)
    write_clip_standin(tmp_path / "clip.safetensors", SHALLOW)
    idle = {"logit_scale": np.float32(1), "text_model.embeddings.position_ids": np.arange(77)[None],
            "vision_model.embeddings.position_ids": np.arange(50)[None]}
    save_arrays(tmp_path / "clip.safetensors", {**arrays(tmp_path / "clip.safetensors"), **idle})
    assert_equal(merged_arrays(SD15, tmp_path, {**files, "open_clip_vit": tmp_path / "clip.safetensors"}), expected)


@pytest.mark.parametrize("width, given, expected", [
    (512, "", "quick_gelu"), (768, "", "quick_gelu"), (1024, "", "gelu"), (1280, "", "gelu"), (32, "", "gelu"),
    (768, "gelu", "gelu"), (1024, "quick_gelu", "quick_gelu")])
def test_the_activation_of_an_image_encoder(merged, width, given, expected):
    """By the width of its embedding unless the configuration tells."""
    with open_checkpoint(merged) as file:
        proj = "embedder.image_encoder.model.visual.proj"
        tensors = {**file.tensors, proj: file.tensors[proj]._replace(shape=(64, width))}
        sizes = merged_sizes(tensors, SD15, ModelConfig(image_activation=given))
    assert (sizes.image.embed_dim, sizes.image.activation) == (width, expected)


def test_the_activation_reaches_the_network(merged):
    """And what is kept of its embeddings: a cache made with another one is not used."""
    pixels = Tensor(np.linspace(-2, 2, 3 * 224 * 224, dtype=np.float32).reshape(1, 3, 224, 224))
    embeddings, fingerprints = {}, {}
    for activation in ("", "gelu", "quick_gelu"):
        model = build_model(merged, ModelConfig(image_activation=activation))
        embeddings[activation] = model.embedder.image_encoder(pixels).asnumpy()
        fingerprints[activation] = FrozenEncoders(model).fingerprint
    assert fingerprints[""] == fingerprints["gelu"] != fingerprints["quick_gelu"]
    np.testing.assert_array_equal(embeddings[""], embeddings["gelu"])
    assert np.abs(embeddings["gelu"] - embeddings["quick_gelu"]).max() > 1e-4


@pytest.mark.parametrize("family, fixture, prefix", [(SD15, "standins", TEXT), (SDXL, "standins_xl", TEXT_XL)])
def test_text_encoders_without_text_model_in_their_names(family, fixture, prefix, request, tmp_path):
    files = {**request.getfixturevalue(fixture), "controlnet": None}
    expected = merged_arrays(family, tmp_path, files)
    base = {name.replace(f"{prefix}text_model.", prefix): value for name, value in arrays(files["base"]).items()}
    assert f"{prefix}encoder.layers.0.mlp.fc1.weight" in base
    save_arrays(tmp_path / "base.safetensors", {**base, f"{prefix}embeddings.position_ids": np.arange(77)[None]})
    assert_equal(merged_arrays(family, tmp_path, {**files, "base": tmp_path / "base.safetensors"}), expected)


def with_channels(tensors: dict, name: str, channels: int) -> dict:
    """The same with another number of input channels of one convolution."""
    weight = tensors[name]
    return {**tensors, name: np.zeros((len(weight), channels, *weight.shape[2:]), np.float32)}


@pytest.mark.parametrize("channels, kind", [(9, "an inpainting model"), (8, "an InstructPix2Pix model"),
                                            (5, "a depth model"), (7, "another kind of model")])
def test_unets_of_other_tasks_are_refused_by_name(standins, merged, channels, kind, tmp_path):
    words = f"is {kind}, whose UNet takes {channels} channels and gives 4; expected a text-to-image model"
    base = with_channels(arrays(standins["base"]), f"{UNET}input_blocks.0.0.weight", channels)
    save_arrays(tmp_path / "base.safetensors", base)
    with pytest.raises(CheckpointError, match=f"--sd .*base.safetensors: {words}"):
        merge(SD15, **{**standins, "base": tmp_path / "base.safetensors"}, out=tmp_path / "out.ckpt")
    whole = with_channels(arrays(merged), f"{UNET}input_blocks.0.0.conv.weight", channels)
    save_arrays(tmp_path / "merged.safetensors", whole)
    with pytest.raises(CheckpointError, match=f"merged.safetensors: {words}"):
        build_model(tmp_path / "merged.safetensors", ModelConfig())


def test_autoencoders_of_other_latents_are_refused(standins, merged, tmp_path):
    """Those of SD3 and Flux also lack a convolution on either side of the latents."""
    words = r"autoencoder with 16 latent channels \(as those of SD3 and Flux have\), the UNet takes 4"
    vae = {name: value for name, value in arrays(standins["vae"]).items() if "quant_conv" not in name}
    save_arrays(tmp_path / "vae.safetensors", with_channels(vae, "decoder.conv_in.weight", 16))
    with pytest.raises(CheckpointError, match=f"--vae .*vae.safetensors: holds an {words}"):
        merge(SD15, **{**standins, "vae": tmp_path / "vae.safetensors"}, out=tmp_path / "out.ckpt")
    for source, flag in ((standins["base"], "--sd .*"), (merged, "")):
        save_arrays(tmp_path / "x.safetensors",
                    with_channels(arrays(source), "first_stage_model.decoder.conv_in.weight", 16))
        with pytest.raises(CheckpointError, match=f"{flag}x.safetensors: holds an {words}"):
            if flag:
                merge(SD15, **{**standins, "base": tmp_path / "x.safetensors", "vae": None}, out=tmp_path / "out.ckpt")
            else:
                build_model(tmp_path / "x.safetensors", ModelConfig())


def test_an_autoencoder_that_is_replaced_does_not_count(standins, merged, tmp_path):
    """Neither of other latents nor missing; in a file to merge and in a merged one."""
    base, expected = arrays(standins["base"]), arrays(merged)
    wrong = with_channels(base, "first_stage_model.decoder.conv_in.weight", 16)
    none = {name: value for name, value in base.items() if not name.startswith("first_stage_model.")}
    for tensors in (wrong, none):
        save_arrays(tmp_path / "base.safetensors", tensors)
        files = {**standins, "controlnet": None, "base": tmp_path / "base.safetensors"}
        assert_equal(merged_arrays(SD15, tmp_path, files), expected)
    with pytest.raises(CheckpointError, match="--sd .*is not a whole model"):
        merge(SD15, **{**files, "vae": None}, out=tmp_path / "no.ckpt")
    save_arrays(tmp_path / "x.safetensors", with_channels(expected, "first_stage_model.decoder.conv_in.weight", 16))
    model = build_model(tmp_path / "x.safetensors", ModelConfig(), extra=ExtraParts(vae=standins["vae"]))
    want = arrays(standins["vae"])["decoder.conv_in.weight"]
    np.testing.assert_array_equal(model.diffusion.vae.decoder.conv_in.weight.asnumpy().reshape(want.shape), want)
