"""Files given part by part: which network a published or finetuned file holds, under which names, and of what size.

Merging and building both come here; reading and strict checking is in `ldm/checkpoint.py`.
"""
from __future__ import annotations

import re
from dataclasses import dataclass

from mindspore import dtype as mstype
from mindspore.nn.utils import no_init_parameters

from ip_adapter.config import ModelConfig
from ip_adapter.families import Family, family_of
from ip_adapter.image_prompt import ImageProjConfig, image_proj_config
from ip_adapter.names import IMAGE_ENCODER_TORCH, IMAGE_PROJ_TORCH, image_attention_torch
from ip_adapter.patch import transformer_blocks
from ldm.architecture import autoencoder_config, image_config, text_config, unet_config
from ldm.checkpoint import Part, View, best_layout, check, parameter_shapes
from ldm.checkpoint_file import CheckpointError, CheckpointFile
from ldm.layout import Layout
from ldm.modules.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.modules.clip import CLIPImageConfig, CLIPImageTransformer, CLIPTextConfig
from ldm.modules.controlnet import ControlNet
from ldm.modules.unet import UNetConfig, UNetModel
from ldm.names import (
    CONTROLNET_DIFFUSERS,
    CONTROLNET_TORCH,
    UNET_TORCH,
    VAE_ALONE,
    VAE_DIFFUSERS,
    VAE_MINDSPORE,
    VAE_TORCH,
)


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of all the networks of a model with an IP-Adapter; the default is SD-1.5's. None is absent."""

    unet: UNetConfig | None = UNetConfig()
    vae: AutoencoderConfig | None = AutoencoderConfig()
    texts: tuple = (CLIPTextConfig(),)
    image: CLIPImageConfig | None = CLIPImageConfig()
    proj: ImageProjConfig | None = ImageProjConfig()


    def absent(self) -> list:
        """What is missing of a model without an adapter, by name."""
        parts = {"UNet": self.unet, "autoencoder": self.vae, "image encoder": self.image,
                 **{f"text encoder{f' {n}' if len(self.texts) > 1 else ''}": size
                    for n, size in enumerate(self.texts, 1)}}
        return [name for name, size in parts.items() if size is None]


def merged_sizes(tensors: dict, family: Family, config: ModelConfig) -> ModelSizes:
    """What a merged file of a family holds."""
    unet, vae, *texts = (View(tensors, layout) for layout in family.mindspore)
    return ModelSizes(
        unet_config(unet, config.num_heads, config.num_head_channels, config.norm_groups),
        autoencoder_config(vae, config.norm_groups),
        tuple(text_config(view, activation) for view, activation in zip(texts, family.activations)),
        image_config(View(tensors, family.image_encoder), config.image_heads),
        image_proj_config(View(tensors, family.image_proj)),
    )


ENCODERS = {1024: "ViT-H (1024)", 1280: "ViT-bigG (1280)"}


def vae_part(file: CheckpointFile, norm_groups: int = 32, dtype=mstype.float32) -> tuple:
    """The autoencoder a file holds, in any spelling: the network, not initialised, and its checked part."""
    probe = ("encoder.norm_out.gamma", "encoder.mid.attn_1.q.weight")
    layout = best_layout(file.tensors, probe, VAE_DIFFUSERS + (VAE_ALONE, VAE_TORCH, VAE_MINDSPORE))
    size = autoencoder_config(View(file.tensors, layout), norm_groups)
    if size is None:
        raise CheckpointError(f"--vae {file.path}: holds no autoencoder; expected that of diffusers, such as "
                              "sd-vae-ft-mse/diffusion_pytorch_model.safetensors")
    with no_init_parameters():
        autoencoder = AutoencoderKL(size, dtype)
    part = Part(parameter_shapes(autoencoder), file, layout)
    check([part], allowed=rf"^(?!{re.escape(layout.prefix)})")  # a whole model may hold it
    return autoencoder, part


def image_encoder_part(file: CheckpointFile) -> tuple:
    """The image encoder in a Hugging Face file or in a merged one of either family, which may use the same: the
    network, not initialised, and its checked part."""
    merged = family_of(file.tensors).image_encoder
    layout = best_layout(file.tensors, ("class_embedding", "proj"), (IMAGE_ENCODER_TORCH, merged))
    size = image_config(View(file.tensors, layout))
    if size is None:
        raise CheckpointError(f"--open_clip_vit {file.path}: holds no image encoder; expected "
                              "IP-Adapter's image_encoder/model.safetensors")
    with no_init_parameters():
        encoder = CLIPImageTransformer(size)
    part = Part(parameter_shapes(encoder), file, layout)
    check([part], allowed=rf"^(?!{re.escape(layout.prefix)})" if layout is merged else r"(?!)")
    return encoder, part


def adapter_layouts(unet: UNetModel, family: Family) -> dict:
    """How adapters are named, finetuned here and published: layouts of the image attention and of the projector."""
    return {"finetuned": (family.mindspore[0], family.image_proj),
            "published": (image_attention_torch([path for path, _ in transformer_blocks(unet)]), IMAGE_PROJ_TORCH)}


def find_adapter(file: CheckpointFile, unet: UNetModel, embed_dim: int, family: Family) -> tuple:
    """How an adapter is named, published, finetuned or inside a merged file.

    Args:
        file: holds the adapter.
        unet: the UNet it is meant for.
        embed_dim: width of the image encoder's embedding.
        family: of the UNet.

    Returns:
        Sizes of the projector, layout of the image attention, layout of the projector.

    Raises:
        CheckpointError: it is of another kind, or was trained with another image encoder or base model.
    """
    probe = [f"{path}.attn2.to_k_ip.weight" for path, _ in transformer_blocks(unet)]
    layouts = {attention: (attention, proj) for attention, proj in adapter_layouts(unet, family).values()}
    attention, proj = layouts[best_layout(file.tensors, probe, layouts)]
    size: ImageProjConfig | None = image_proj_config(View(file.tensors, proj))
    if size is None:
        plus = any(name.startswith(("image_proj.latents", "image_proj.proj.0")) for name in file.tensors)
        raise CheckpointError(f"--ip_adapter {file.path}: " + (
            "is a plus or full-face adapter; only the plain ones, with 4 tokens of the image embedding, are supported"
            if plus else f"holds no adapter; expected {family.adapter}"))
    if size.embed_dim != embed_dim:
        trained = ENCODERS.get(size.embed_dim, f"an encoder of width {size.embed_dim}")
        given = ENCODERS.get(embed_dim, f"of width {embed_dim}")
        raise CheckpointError(f"--ip_adapter {file.path}: this adapter was trained with {trained}; "
                              f"the encoder given is {given}")
    if size.context_dim != unet.config.context_dim:
        raise CheckpointError(f"--ip_adapter {file.path}: this adapter makes tokens of width {size.context_dim}, the "
                              f"UNet takes {unet.config.context_dim}; it was trained for another base model")
    return size, attention, proj


def controlnet_part(file: CheckpointFile, unet: UNetConfig, family: Family, dtype=mstype.float32) -> tuple:
    """The ControlNet a file holds: diffusers' names, original ones, or those of a merged file.

    Args:
        file: holds the ControlNet, alone or, if original or merged, with the model around it.
        unet: sizes of the UNet it is to steer.
        family: of the UNet.
        dtype: of the network.

    Returns:
        The network, not initialised, and its part. Only a merged file is left unchecked: it has other parts as well.

    Raises:
        CheckpointError: there is none, or it is for another base model.
    """
    probe = ("input_hint_block.0.weight", "middle_block_out.0.weight", "input_blocks.1.0.in_layers.0.gamma")
    layout: Layout = best_layout(file.tensors, probe, (CONTROLNET_DIFFUSERS, *CONTROLNET_TORCH, family.controlnet))
    view = View(file.tensors, layout)
    size = unet_config(view, unet.num_heads, unet.num_head_channels, unet.norm_groups)
    merged = layout is family.controlnet
    if size is None or any(path not in view for path in probe):
        how = f"merge one with {family.tool} --controlnet FILE or give --controlnet FILE" if any(
            name.startswith(UNET_TORCH.prefix) for name in file.tensors) else f"expected {family.controlnets}"
        raise CheckpointError(f"--controlnet {file.path}: holds no ControlNet; {how}")
    if (size.model_channels, size.channel_mult, size.context_dim) != (
            unet.model_channels, unet.channel_mult, unet.context_dim):
        raise CheckpointError(
            f"--controlnet {file.path}: is for a UNet of {size.model_channels} x {size.channel_mult} channels and text "
            f"of width {size.context_dim}; this one has {unet.model_channels} x {unet.channel_mult} and "
            f"{unet.context_dim}: it was trained for another base model")
    with no_init_parameters():
        controlnet = ControlNet(size, dtype)
    part = Part(parameter_shapes(controlnet), file, layout)
    check([part], allowed="" if merged else r"(?!)")
    return controlnet, part
