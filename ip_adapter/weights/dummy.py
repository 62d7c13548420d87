"""Seeded stand-ins for the published files of both families: same names and layout, any size, values from a fixed rule.

They let the tests and the benchmark go the way real weights go. Pictures made with them are noise.
"""
from __future__ import annotations

import math
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
from mindspore.nn.utils import no_init_parameters

from ip_adapter.families import SD15, Family
from ip_adapter.image_prompt import ImageProjConfig, ImageProjModel
from ip_adapter.names import IMAGE_ATTENTION, IMAGE_ENCODER_TORCH, IMAGE_PROJ_TORCH, TEXT_ONLY, image_attention_torch
from ip_adapter.patch import patch_cross_attention, transformer_blocks
from ip_adapter.weights.parts import ModelSizes
from ldm.checkpoints.file import TensorInfo, write_checkpoint
from ldm.checkpoints.layout import Layout
from ldm.checkpoints.loading import parameter_shapes
from ldm.checkpoints.names import CLIP_TEXT_TORCH, CONTROLNET_DIFFUSERS, VAE_DIFFUSERS
from ldm.modules.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.modules.clip import CLIPImageConfig, CLIPImageTransformer, CLIPTextConfig, CLIPTextTransformer
from ldm.modules.controlnet import ControlNet
from ldm.modules.unet import UNetConfig, UNetModel

MINIATURE = ModelSizes(
    UNetConfig(model_channels=32, context_dim=128),
    AutoencoderConfig(channels=32),
    (CLIPTextConfig(width=128, layers=2, heads=2, mlp_width=512),),
    CLIPImageConfig(width=64, layers=2, mlp_width=256, embed_dim=32),
    ImageProjConfig(embed_dim=32, context_dim=128),
)
MINIATURE_XL = ModelSizes(
    UNetConfig(model_channels=32, channel_mult=(1, 2, 4), transformer_depth=(0, 1, 2), middle_depth=2,
               context_dim=192, num_heads=-1, num_head_channels=32, use_linear=True, adm_in_channels=128 + 6 * 256),
    AutoencoderConfig(channels=32),
    (CLIPTextConfig(width=64, layers=3, heads=1, mlp_width=256),
     CLIPTextConfig(width=128, layers=2, heads=2, mlp_width=512, activation="gelu", projection=128)),
    CLIPImageConfig(width=64, layers=2, mlp_width=256, embed_dim=48),
    ImageProjConfig(embed_dim=48, context_dim=192),
)


def seeded(name: str, shape: tuple, seed: int = 0) -> np.ndarray:
    """The values of one tensor, from its name on disk, its shape there and a seed.

    Uniform, with deviation 1 / sqrt(fan in) for weights, 0.02 for biases and embeddings, and gains of 1 +- 0.05.
    Only the raw integers of the generator are used, which NumPy keeps the same from release to release.
    """
    key = np.array([zlib.crc32(f"{name} {shape}".encode()), seed], np.uint64)
    bits = np.random.Philox(key=key).random_raw(math.prod(shape)) >> np.uint64(40)
    unit = ((bits.astype(np.float32) + 0.5) / 2**24 - 0.5) * math.sqrt(12.0)
    if "embedding" in name and not name.endswith("patch_embedding.weight"):
        unit *= 0.02
    elif len(shape) == 1:
        unit = 1 + 0.05 * unit if name.endswith(".weight") else 0.02 * unit
    else:
        unit *= math.prod(shape[1:]) ** -0.5
    return unit.reshape(shape).astype(np.float32)


def write_standin(path: Path, parts: list, seed: int = 0) -> None:
    """Write one file.

    Args:
        path: .safetensors to write.
        parts: (shapes by network path, layout of the file) of every part.
        seed: see `seeded`.
    """
    infos = {}
    for shapes, layout in parts:
        for name_path, shape in shapes.items():
            for name, (on_disk, _) in layout.source(name_path).disassemble(shape).items():
                infos[name] = TensorInfo(on_disk, "float32")
    write_checkpoint(path, infos, lambda name: seeded(name, infos[name].shape, seed))


def write_clip_standin(path: Path, sizes: ModelSizes = MINIATURE, seed: int = 0) -> None:
    """Write a whole CLIP in Hugging Face's layout: text and image encoder with their projections."""
    with no_init_parameters():
        text = CLIPTextTransformer(replace(sizes.texts[0], projection=sizes.image.embed_dim))
        image = CLIPImageTransformer(sizes.image)
    parts = [(parameter_shapes(text), CLIP_TEXT_TORCH), (parameter_shapes(image), IMAGE_ENCODER_TORCH)]
    write_standin(path, parts, seed)


def write_standins(folder: Path, sizes: ModelSizes = MINIATURE, seed: int = 0, family: Family = SD15) -> dict:
    """Write the published files of a family with an IP-Adapter and a ControlNet, under their usual names.

    Returns:
        The paths, by the argument of `ip_adapter.weights.merging.merge` they belong to.
    """
    with no_init_parameters():
        unet = UNetModel(sizes.unet)
        patch_cross_attention(unet, sizes.proj.num_tokens)
        vae, texts = AutoencoderKL(sizes.vae), [CLIPTextTransformer(size) for size in sizes.texts]
        image, proj = CLIPImageTransformer(sizes.image), ImageProjModel(sizes.proj)
        controlnet = ControlNet(sizes.unet)
    base, adapter, control = {
        "SD-1.5": ("v1-5-pruned-emaonly", "ip-adapter_sd15", "control_v11f1p_sd15_depth"),
        "SDXL": ("sd_xl_base_1.0", "ip-adapter_sdxl", "controlnet-depth-sdxl-1.0")}[family.name]
    paths = {
        "base": folder / f"{base}.safetensors",
        "vae": folder / "sd-vae-ft-mse" / "diffusion_pytorch_model.safetensors",
        "open_clip_vit": folder / "IP-Adapter" / "image_encoder" / "model.safetensors",
        "ip_adapter": folder / "IP-Adapter" / f"{adapter}.safetensors",
        "controlnet": folder / control / "diffusion_pytorch_model.safetensors",
    }
    attention: Layout = image_attention_torch([path for path, _ in transformer_blocks(unet)])
    shapes = [parameter_shapes(unet, TEXT_ONLY)] + [parameter_shapes(cell) for cell in (vae, *texts)]
    shapes[-1].update({name: () for name in family.carried})
    write_standin(paths["base"], list(zip(shapes, family.torch)), seed)
    write_standin(paths["vae"], [(parameter_shapes(vae), VAE_DIFFUSERS[0])], seed)
    write_standin(paths["open_clip_vit"], [(parameter_shapes(image), IMAGE_ENCODER_TORCH)], seed)
    write_standin(paths["ip_adapter"], [(parameter_shapes(unet, IMAGE_ATTENTION), attention),
                                        (parameter_shapes(proj), IMAGE_PROJ_TORCH)], seed)
    write_standin(paths["controlnet"], [(parameter_shapes(controlnet), CONTROLNET_DIFFUSERS)], seed)
    return paths
