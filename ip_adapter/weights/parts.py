"""Files given part by part: which network a published or finetuned file holds, under which names, and of what size.

Merging and building both come here; reading and strict checking is in `ldm/checkpoints/loading.py`.
"""
from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from mindspore import dtype as mstype
from mindspore.nn.utils import no_init_parameters

from ip_adapter.config import ModelConfig
from ip_adapter.families import Family, family_of
from ip_adapter.image_prompt import ImageProjConfig, image_proj_config
from ip_adapter.names import IMAGE_ENCODER_TORCH, IMAGE_PROJ_TORCH, image_attention_torch, trained_adapter
from ip_adapter.patch import transformer_blocks
from ldm.checkpoints.architecture import autoencoder_config, image_config, text_config, unet_config
from ldm.checkpoints.file import CheckpointError, CheckpointFile, open_checkpoint
from ldm.checkpoints.layout import Layout
from ldm.checkpoints.loading import Part, View, best_layout, check, parameter_shapes
from ldm.checkpoints.names import (
    CONTROLNET_DIFFUSERS,
    CONTROLNET_PREFIX,
    CONTROLNET_TORCH,
    UNET_TORCH,
    VAE_ALONE,
    VAE_DIFFUSERS,
    VAE_MINDSPORE,
    VAE_TORCH,
)
from ldm.errors import UserError
from ldm.modules.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.modules.clip import CLIPImageConfig, CLIPImageTransformer, CLIPTextConfig
from ldm.modules.controlnet import ControlNet
from ldm.modules.unet import UNetConfig, UNetModel


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
    """What a merged file of a family holds.

    Raises:
        UserError: a number of heads or groups in `config` does not divide the channels of a network.
    """
    unet, vae, *texts = (View(tensors, layout) for layout in family.mindspore)
    sizes = ModelSizes(
        unet_config(unet, config.num_heads, config.num_head_channels, config.norm_groups),
        autoencoder_config(vae, config.norm_groups),
        tuple(text_config(view, activation) for view, activation in zip(texts, family.activations)),
        image_encoder_config(View(tensors, family.image_encoder), config.image_heads, config.image_activation),
        image_proj_config(View(tensors, family.image_proj)),
    )
    check_sizes(sizes, config)
    return sizes


def check_sizes(sizes: ModelSizes, config: ModelConfig) -> None:
    """Check the heads and groups of a configuration against the channels of the networks they are to divide.

    Raises:
        UserError: naming the key of the YAML file.
    """
    unet, vae, image = sizes.unet, sizes.vae, sizes.image
    if unet:
        levels = [unet.model_channels * times for times in unet.channel_mult]
        attending = [width for width, depth in zip(levels, unet.transformer_depth) if depth]
        attending += levels[-1:] if unet.middle_depth else []
        keys = [key for key in ("num_heads", "num_head_channels") if getattr(config, key) != -1] or ["num_heads"]
        for key in keys:
            _check_divides(key, getattr(config, key), attending, "the UNet's attention")
        _check_divides("norm_groups", config.norm_groups, [unet.model_channels] + levels, "the UNet")
    if vae:
        _check_divides("norm_groups", config.norm_groups, [vae.channels], "the autoencoder")
    if image:
        _check_divides("image_heads", config.image_heads, [image.width], "the image encoder")


def _check_divides(key: str, value: int, widths: list, network: str) -> None:
    wrong = [width for width in widths if value < 1 or width % value]
    if wrong:
        raise UserError(f"model.{key} is {value}, but {network} has {wrong[0]} channels, expected a positive number "
                        "that divides them; correct it in the YAML file of --config")


_OPENAI_WIDTHS = (512, 768)  # of the embeddings of ViT-B and ViT-L; IP-Adapter's OpenCLIP encoders are wider


def image_encoder_config(view: View, heads: int = 16, activation: str = "") -> CLIPImageConfig | None:
    """Sizes of the image encoder in `view`; None if there is none.

    Args:
        view: the tensors, by the encoder's paths.
        heads: of every attention.
        activation: "gelu", "quick_gelu", or "" for that of the encoders usual with an embedding of this width.
    """
    size = image_config(view, heads)
    if size is None:
        return None
    usual = "quick_gelu" if size.embed_dim in _OPENAI_WIDTHS else "gelu"
    return replace(size, activation=activation or usual)


ENCODERS = {1024: "ViT-H (1024)", 1280: "ViT-bigG (1280)"}
USUAL_ENCODER = {"SD-1.5": 1024, "SDXL": 1280}  # what the merge tools take by default
USUAL_TOKENS = 4  # of a plain adapter
FACE_WIDTH = 512  # of the embedding that insightface makes of a face
# Files that are taken for adapters, by a name in them.
OTHER_KINDS = (
    (r"[._]lora(_[AB]|_down|_up)?\.", "a LoRA"),
    (r"^(adapter\.)?body\.\d+\.(resnets\.|block1\.|in_conv\.)", "a T2I-Adapter"),
    (r"^(control_model\.|controlnet_down_blocks\.)", "a ControlNet (give it by --controlnet)"),
    (r"(?:^|\.)(ip_adapter|adapter_modules)\.\d+\.to_k_ip\.", "half an adapter, without its projector (image_proj.)"),
    (r"^(model\.diffusion_model|first_stage_model)\.", "a whole model without a plain adapter"),
)


# What a UNet is for that takes more than latents, by its channels.
_OTHER_UNETS = {5: "a depth model", 8: "an InstructPix2Pix model", 9: "an inpainting model"}


def check_channels(where: str, unet: UNetConfig, vae: AutoencoderConfig | None) -> None:
    """Check that UNet and autoencoder pass each other latents and nothing else.

    Args:
        where: flag and file that the message names.
        unet: sizes of the UNet.
        vae: sizes of the autoencoder; None for one that another file replaces.

    Raises:
        CheckpointError: the UNet takes more beside the latents, or the autoencoder makes others.
    """
    if unet.in_channels != unet.out_channels:
        kind = _OTHER_UNETS.get(unet.in_channels, "another kind of model")
        raise CheckpointError(f"{where}: is {kind}, whose UNet takes {unet.in_channels} channels and gives "
                              f"{unet.out_channels}; expected a text-to-image model, with as many in as out")
    if vae is not None and vae.latent_channels != unet.in_channels:
        kind = " (as those of SD3 and Flux have)" if vae.latent_channels == 16 else ""
        raise CheckpointError(f"{where}: holds an autoencoder with {vae.latent_channels} latent channels{kind}, the "
                              f"UNet takes {unet.in_channels}; give an autoencoder of the same family as the UNet")


def vae_part(file: CheckpointFile, unet: UNetConfig, norm_groups: int | None = None, dtype=mstype.float32) -> tuple:
    """The autoencoder a file holds, in any spelling.

    Args:
        file: holds the autoencoder, alone or in a whole model.
        unet: sizes of the UNet whose latents it is to decode.
        norm_groups: of every group norm; None for a network that is not to run.
        dtype: of the network.

    Returns:
        The network, not initialised, and its checked part.
    """
    probe = ("encoder.norm_out.gamma", "encoder.mid.attn_1.q.weight")
    layout = best_layout(file.tensors, probe, VAE_DIFFUSERS + (VAE_ALONE, VAE_TORCH, VAE_MINDSPORE))
    size = autoencoder_config(View(file.tensors, layout), 32 if norm_groups is None else norm_groups)
    if size is None:
        raise CheckpointError(f"--vae {file.path}: holds no autoencoder; expected that of diffusers, such as "
                              "sd-vae-ft-mse/diffusion_pytorch_model.safetensors")
    check_channels(f"--vae {file.path}", unet, size)
    if norm_groups is not None:
        _check_divides("norm_groups", norm_groups, [size.channels], f"the autoencoder of --vae {file.path}")
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
    size = image_encoder_config(View(file.tensors, layout))
    if size is None:
        raise CheckpointError(f"--open_clip_vit {file.path}: holds no image encoder; expected "
                              "IP-Adapter's image_encoder/model.safetensors")
    with no_init_parameters():
        encoder = CLIPImageTransformer(size)
    part = Part(parameter_shapes(encoder), file, layout)
    check([part], allowed=rf"^(?!{re.escape(layout.prefix)})" if layout is merged else r"(?!)")
    return encoder, part


def adapter_layouts(unet: UNetModel, family: Family) -> dict:
    """How adapters are named, finetuned here, published, and as tencent's training leaves them: layouts of the image
    attention and of the projector."""
    paths = [path for path, _ in transformer_blocks(unet)]
    layouts = {"finetuned": (family.mindspore[0], family.image_proj),
               "published": (image_attention_torch(paths), IMAGE_PROJ_TORCH)}
    for devices, wrapped in (("", ""), (" by several devices", "module.")):
        counted, inside, proj = trained_adapter(paths, unet.config.num_res_blocks, wrapped)
        layouts[f"trained{devices}"] = counted, proj
        layouts[f"trained{devices}, attention in the UNet"] = inside, proj
    return layouts


def kind_of_adapter(tensors: dict) -> str:
    """What a file without a usable plain adapter holds, as words that follow "is"; empty if it is nothing known."""
    found = re.compile(r"(?:^|\.)image_proj(?:_model)?\.(.+)$")
    proj = {match[1]: tensors[name].shape for name in tensors if (match := found.search(name))}
    if "proj.weight" in proj:
        return "an adapter of another family, or one whose projector (image_proj.) has impossible sizes"
    if "proj.3.weight" in proj:
        return "a full-face adapter, which sees all patches of a face"
    if "perceiver_resampler.proj_in.weight" in proj:
        return "a FaceID-Plus or FaceID-PlusV2 adapter, for the embedding of a face and a picture of it"
    if "proj.0.weight" in proj:
        rows, width = proj.get("proj.2.weight", ()), proj.get("norm.weight", ())
        tokens = rows[0] // width[0] if rows and width and width[0] else 0
        return f"a FaceID{' portrait' if tokens > 4 else ''} adapter, for the embedding of a face"
    if "latents" in proj:
        if proj.get("proj_in.weight", ())[1:] == (FACE_WIDTH,):
            return "an InstantID or FaceID portrait-unnorm adapter, for the embedding of a face"
        return "a Plus adapter (also plus-face or composition), which sees all patches of the picture"
    for pattern, kind in OTHER_KINDS:
        if any(re.search(pattern, name) for name in tensors):
            return kind
    return ""


def adapter_width(path: Path) -> int | None:
    """Width of the image embedding that a plain adapter takes, however its tensors are named; None for other files."""
    with open_checkpoint(path) as file:
        shapes = [info.shape for name, info in file.tensors.items()
                  if re.search(r"(?:^|\.)image_proj(?:_model)?\.proj\.weight$", name)]
    return shapes[0][1] if shapes and len(shapes[0]) == 2 else None


class MergedKind(NamedTuple):
    """In what merged files differ so that one cannot take the place of the other.

    Attributes:
        family: its name.
        encoder: width of the image encoder's embedding; 0 without an image encoder.
        tokens: that the adapter makes of an image; 0 without a plain adapter.
        controlnet: whether it holds a ControlNet.
    """

    family: str
    encoder: int
    tokens: int
    controlnet: bool

    def suffix(self) -> str:
        """What differs from a merge with the tool's defaults, for a file's name, such as "vit-h.controlnet"."""
        encoder = ENCODERS.get(self.encoder, f"encoder-{self.encoder}").split()[0].lower()
        parts = [encoder] if self.encoder != USUAL_ENCODER[self.family] else []
        if self.tokens != USUAL_TOKENS:
            parts.append(f"{self.tokens}-tokens" if self.tokens else "no-adapter")
        return ".".join(parts + ["controlnet"] * self.controlnet) or "plain"

    def __str__(self) -> str:
        encoder = ENCODERS.get(self.encoder, f"an image encoder of width {self.encoder}")
        adapter = f"an adapter of {self.tokens} tokens" if self.tokens else "no adapter"
        return (f"{self.family}, {encoder if self.encoder else 'no image encoder'}, {adapter}, "
                f"{'a' if self.controlnet else 'no'} ControlNet")


def merged_kind(tensors: dict) -> MergedKind:
    """The kind of a merged file with these tensors, by name."""
    family = family_of(tensors)
    encoder = image_encoder_config(View(tensors, family.image_encoder))
    adapter = image_proj_config(View(tensors, family.image_proj))
    return MergedKind(family.name, encoder.embed_dim if encoder else 0, adapter.num_tokens if adapter else 0,
                      any(name.startswith(CONTROLNET_PREFIX) for name in tensors))


def kind_of_file(path: Path) -> MergedKind | None:
    """The kind of a merged file; None where no checkpoint can be read."""
    try:
        with open_checkpoint(path) as file:
            return merged_kind(file.tensors)
    except CheckpointError:
        return None


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
        kind = kind_of_adapter(file.tensors)
        raise CheckpointError(f"--ip_adapter {file.path}: " + (
            f"is {kind}; only plain adapters, whose tokens are made from the image embedding, are supported, such as "
            f"{family.adapter}" if kind else f"holds no adapter; expected {family.adapter}"))
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
