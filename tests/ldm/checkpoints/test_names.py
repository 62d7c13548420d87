"""Every published file the scripts need loads with nothing missing and nothing left over."""
from __future__ import annotations

from types import SimpleNamespace

import pytest
from mindspore.nn.utils import no_init_parameters

from ip_adapter.families import SD15, SDXL
from ip_adapter.image_prompt import ImageProjConfig, ImageProjModel, image_proj_config
from ip_adapter.names import (
    IMAGE_ATTENTION,
    IMAGE_ENCODER_TORCH,
    IMAGE_PROJ_TORCH,
    TEXT_ONLY,
    image_attention_torch,
)
from ip_adapter.patch import patch_cross_attention, transformer_blocks
from ldm.checkpoints.architecture import autoencoder_config, image_config, text_config, unet_config
from ldm.checkpoints.file import CheckpointError, TensorInfo
from ldm.checkpoints.loading import Part, View, best_layout, check, parameter_shapes, plan
from ldm.checkpoints.names import CONTROLNET_DIFFUSERS, CONTROLNET_SD15, CONTROLNET_TORCH, VAE_DIFFUSERS
from ldm.modules.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.modules.clip import CLIPImageConfig, CLIPImageTransformer, CLIPTextConfig, CLIPTextTransformer
from ldm.modules.controlnet import ControlNet
from ldm.modules.unet import UNetConfig, UNetModel
from tests.support.arrays import DATA


def manifest(name: str) -> SimpleNamespace:
    """Stands for an open file: names, shapes and dtypes of a published one."""
    tensors = {}
    for line in (DATA / "manifests" / f"{name}.tsv").read_text().splitlines():
        key, shape, dtype = line.split("\t")
        tensors[key] = TensorInfo(() if shape == "scalar" else tuple(map(int, shape.split("x"))), dtype)
    return _File(name, tensors)


class _File:
    def __init__(self, path, tensors):
        self.path, self.tensors = path, tensors


@pytest.fixture(scope="module")
def shapes() -> dict:
    """Parameter shapes of the full-size networks, no memory taken."""
    with no_init_parameters():
        unet = UNetModel(UNetConfig())
        patch_cross_attention(unet)
        return {"unet": parameter_shapes(unet, TEXT_ONLY), "image attention": parameter_shapes(unet, IMAGE_ATTENTION),
                "vae": parameter_shapes(AutoencoderKL(AutoencoderConfig())),
                "text": parameter_shapes(CLIPTextTransformer(CLIPTextConfig())),
                "image encoder": parameter_shapes(CLIPImageTransformer(CLIPImageConfig())),
                "projector": parameter_shapes(ImageProjModel(ImageProjConfig())),
                "blocks": [path for path, _ in transformer_blocks(unet)]}


def test_published_base(shapes):
    file = manifest("v1-5-pruned-emaonly.safetensors")
    check([Part(shapes[name], file, layout) for name, layout in zip(("unet", "vae", "text"), SD15.torch)])


def test_mindspore_base(shapes):
    file = manifest("sd_v1.5-d0ab7146.ckpt")
    check([Part(shapes[name], file, layout) for name, layout in zip(("unet", "vae", "text"), SD15.mindspore)])


def test_merged(shapes):
    file = manifest("sd_v1.5_ip_adapter.ckpt")
    parts = [Part(shapes[name], file, layout) for name, layout in zip(("unet", "vae", "text"), SD15.mindspore)]
    parts += [Part(shapes["image attention"], file, SD15.mindspore[0]),
              Part(shapes["image encoder"], file, SD15.image_encoder),
              Part(shapes["projector"], file, SD15.image_proj)]
    check(parts)
    assert sum(len(part.shapes) for part in parts) == len(file.tensors) == 1510


@pytest.mark.parametrize("spelling", [0, 1])
def test_autoencoder_in_both_spellings(shapes, spelling):
    file = manifest("sd-vae-ft-mse.diffusion_pytorch_model.safetensors")
    if spelling == 1:  # what a current diffusers writes
        for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
            file.tensors = {name.replace(f".{old}.", f".{new}."): info for name, info in file.tensors.items()}
    layout = best_layout(file.tensors, shapes["vae"], VAE_DIFFUSERS)
    assert layout is VAE_DIFFUSERS[spelling]
    check([Part(shapes["vae"], file, layout)])


def test_image_encoder(shapes):
    file = manifest("IP-Adapter.models.image_encoder.model.safetensors")
    check([Part(shapes["image encoder"], file, IMAGE_ENCODER_TORCH)])


@pytest.mark.parametrize("name", ["ip-adapter_sd15", "ip-adapter_sd15_light"])
def test_adapters(shapes, name):
    file = manifest(f"{name}.safetensors")
    check([Part(shapes["image attention"], file, image_attention_torch(shapes["blocks"])),
           Part(shapes["projector"], file, IMAGE_PROJ_TORCH)])


def test_finetuned_adapter(shapes):
    file = manifest("sd-N.ckpt")
    check([Part(shapes["image attention"], file, SD15.mindspore[0]),
           Part(shapes["projector"], file, SD15.image_proj)])


@pytest.mark.parametrize("name, heads, tensors", [("control_v11f1p_sd15_depth", 8, 340),
                                                  ("controlnet-depth-sdxl-1.0", -1, 844)])
def test_controlnets_of_both_families(name, heads, tensors):
    file = manifest(f"{name}.diffusion_pytorch_model.safetensors")
    for original in (False, True):
        layout = CONTROLNET_TORCH[0] if original else CONTROLNET_DIFFUSERS
        size = unet_config(View(file.tensors, layout), heads, 64 if heads < 0 else -1)
        with no_init_parameters():
            shapes = parameter_shapes(ControlNet(size))
        check([Part(shapes, file, layout)])
        assert len(shapes) == len(file.tensors) == tensors
        # The same file under the names of lllyasviel's own code, for the second round.
        file.tensors = {to: info for to, (info, _) in plan(Part(shapes, file, layout), CONTROLNET_TORCH[0]).items()}


def test_merged_with_a_controlnet(shapes):
    file = manifest("sd_v1.5_ip_adapter.controlnet.ckpt")
    with no_init_parameters():
        controlnet = Part(parameter_shapes(ControlNet(UNetConfig())), file, CONTROLNET_SD15)
    unet, vae, text = (Part(shapes[name], file, layout)
                       for name, layout in zip(("unet", "vae", "text"), SD15.mindspore))
    check([unet, vae, text, controlnet, Part(shapes["image attention"], file, SD15.mindspore[0]),
           Part(shapes["image encoder"], file, SD15.image_encoder),
           Part(shapes["projector"], file, SD15.image_proj)])
    assert len(file.tensors) == 1850


def test_adapter_for_bigG_has_its_own_width():
    view = View(manifest("ip-adapter_sd15_vit-G.safetensors").tensors, IMAGE_PROJ_TORCH)
    assert image_proj_config(view) == ImageProjConfig(embed_dim=1280)


def test_sizes_are_read_off_the_tensors():
    file = manifest("sd_v1.5_ip_adapter.ckpt").tensors
    unet, vae, text = (View(file, layout) for layout in SD15.mindspore)
    assert unet_config(unet, num_heads=8) == UNetConfig()
    assert autoencoder_config(vae) == AutoencoderConfig()
    assert text_config(text, "quick_gelu") == CLIPTextConfig()
    assert image_config(View(file, SD15.image_encoder)) == CLIPImageConfig()
    bigg = image_config(View(manifest("IP-Adapter.sdxl_models.image_encoder.model.safetensors").tensors,
                             IMAGE_ENCODER_TORCH))
    assert (bigg.width, bigg.layers, bigg.mlp_width, bigg.embed_dim) == (1664, 48, 8192, 1280)


@pytest.fixture(scope="module")
def sdxl() -> dict:
    """Parameter shapes of the full-size networks of SDXL, by sizes read off the published files."""
    base = manifest("sd_xl_base_1.0.safetensors").tensors
    unet, vae, *texts = (View(base, layout) for layout in SDXL.torch)
    with no_init_parameters():
        unet = UNetModel(unet_config(unet, num_head_channels=64))
        patch_cross_attention(unet)
        cells = [AutoencoderKL(autoencoder_config(vae))] + [
            CLIPTextTransformer(text_config(view, kind)) for view, kind in zip(texts, SDXL.activations)]
        shapes = [parameter_shapes(unet, TEXT_ONLY)] + [parameter_shapes(cell) for cell in cells]
        shapes[-1]["logit_scale"] = ()
    return {"base": shapes, "image attention": parameter_shapes(unet, IMAGE_ATTENTION),
            "blocks": [path for path, _ in transformer_blocks(unet)], "unet": unet.config}


def image_half(name: str, proj: str) -> list:
    """Shapes of an image encoder and of the projector of an adapter."""
    encoder = View(manifest(name).tensors, IMAGE_ENCODER_TORCH)
    adapter = View(manifest(proj).tensors, IMAGE_PROJ_TORCH)
    with no_init_parameters():
        return [parameter_shapes(CLIPImageTransformer(image_config(encoder))),
                parameter_shapes(ImageProjModel(image_proj_config(adapter)))]


SDXL_ENCODERS = {"ip-adapter_sdxl.safetensors": "IP-Adapter.sdxl_models.image_encoder.model.safetensors",
                 "ip-adapter_sdxl_vit-h.safetensors": "IP-Adapter.models.image_encoder.model.safetensors"}


def test_sdxl_base_in_both_spellings(sdxl):
    for name, layouts in (("sd_xl_base_1.0.safetensors", SDXL.torch), ("sd_xl_base_1.0_ms.ckpt", SDXL.mindspore)):
        file = manifest(name)
        check([Part(shapes, file, layout) for shapes, layout in zip(sdxl["base"], layouts)])
        # Each of CLIP-L's 12 blocks keeps three projections apart, weights and biases: 4 more than one parameter each.
        assert sum(map(len, sdxl["base"])) + 12 * 4 == 2514


@pytest.mark.parametrize("name", SDXL_ENCODERS)
def test_sdxl_adapters(sdxl, name):
    _, proj = image_half(SDXL_ENCODERS[name], name)
    file = manifest(name)
    check([Part(sdxl["image attention"], file, image_attention_torch(sdxl["blocks"])),
           Part(proj, file, IMAGE_PROJ_TORCH)])
    assert len(sdxl["image attention"]) + len(proj) == 144


def test_finetuned_sdxl_adapter(sdxl):
    _, proj = image_half(*reversed(next(iter(SDXL_ENCODERS.items()))))
    file = manifest("SDXL-base-1.0_N_ip_only.ckpt")
    check([Part(sdxl["image attention"], file, SDXL.mindspore[0]), Part(proj, file, SDXL.image_proj)])


@pytest.mark.parametrize("name, adapter, controlled, tensors", [
    ("sd_xl_base_1.0_ms_ip_adapter.ckpt", "ip-adapter_sdxl.safetensors", False, 3242),
    ("sd_xl_base_1.0_ms_ip_adapter.vit-h.controlnet.ckpt", "ip-adapter_sdxl_vit-h.safetensors", True, 3894)])
def test_merged_sdxl(sdxl, name, adapter, controlled, tensors):
    file = manifest(name)
    encoder, proj = image_half(SDXL_ENCODERS[adapter], adapter)
    parts = [Part(shapes, file, layout) for shapes, layout in zip(sdxl["base"], SDXL.mindspore)]
    parts += [Part(sdxl["image attention"], file, SDXL.mindspore[0]), Part(encoder, file, SDXL.image_encoder),
              Part(proj, file, SDXL.image_proj)]
    if controlled:
        with no_init_parameters():
            parts.append(Part(parameter_shapes(ControlNet(sdxl["unet"])), file, SDXL.controlnet))
    check(parts)
    assert sum(len(part.shapes) for part in parts) + 12 * 4 == len(file.tensors) == tensors


def test_a_mismatch_lists_both_sides(shapes):
    file = manifest("v1-5-pruned-emaonly.safetensors")
    file.tensors["something.else"] = TensorInfo((1,), "float32")
    file.tensors["first_stage_model.quant_conv.bias"] = TensorInfo((9,), "float32")
    for name in [name for name in file.tensors if ".attn1.to_q." in name]:
        del file.tensors[name]
    with pytest.raises(CheckpointError) as error:
        check([Part(shapes[name], file, layout) for name, layout in zip(("unet", "vae", "text"), SD15.torch)])
    message = str(error.value)
    assert "16 missing" in message and "1 unexpected: something.else" in message
    assert "1 of another shape: first_stage_model.quant_conv.bias (9,), expected (8,)" in message


def test_only_twenty_names_are_listed(shapes):
    file = _File("empty", {"a": TensorInfo((1,), "float32")})
    with pytest.raises(CheckpointError) as error:
        check([Part(shapes["vae"], file, VAE_DIFFUSERS[0])])
    message = str(error.value)
    assert "248 missing" in message and message.count(".bias") + message.count(".weight") == 20
