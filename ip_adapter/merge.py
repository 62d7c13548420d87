"""Merging published files into the one .ckpt that the scripts load, and converting between torch and MindSpore names.

Tensors stream from source to target one by one, so memory stays near the largest tensor.
"""
from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path

from mindspore.nn.utils import no_init_parameters
from tqdm import tqdm

from ip_adapter.image_prompt import ImageProjModel
from ip_adapter.names import EMBEDDER_SD15, IMAGE_ATTENTION, TEXT_ONLY, image_encoder_mindspore, image_proj_mindspore
from ip_adapter.parts import controlnet_part, find_adapter, image_encoder_part, vae_part
from ip_adapter.patch import patch_cross_attention
from ip_adapter.pictures import write_sha256
from ldm.architecture import autoencoder_config, is_sdxl, text_config, unet_config
from ldm.checkpoint import Layout, Part, View, best_layout, check, parameter_shapes, plan
from ldm.checkpoint_file import CheckpointError, CheckpointFile, open_checkpoint, write_checkpoint
from ldm.modules.autoencoder import AutoencoderKL
from ldm.modules.clip import CLIPTextTransformer
from ldm.modules.unet import UNetModel
from ldm.names import (
    CONTROLNET_PREFIX,
    CONTROLNET_SD15,
    TEXT_SD15,
    TEXT_TORCH,
    UNET_SD15,
    UNET_TORCH,
    VAE_MINDSPORE,
    VAE_TORCH,
)

# SD-1.5's base in its two spellings: UNet, autoencoder, text encoder.
SD15_TORCH = (UNET_TORCH, VAE_TORCH, TEXT_TORCH)
SD15_MINDSPORE = (UNET_SD15, VAE_MINDSPORE, TEXT_SD15)
# What a merged file holds beyond the base; it may be merged again, with another adapter for example.
MERGED_EXTRAS = rf"{IMAGE_ATTENTION}|^{re.escape(EMBEDDER_SD15)}|^{re.escape(CONTROLNET_PREFIX)}"


def write_plan(out, planned: dict, description: str) -> int:
    """Write what `plan` describes, with a progress bar and the fingerprint beside the file.

    Returns:
        How many tensors were written.
    """
    with tqdm(total=len(planned), desc=description, unit=" tensors", disable=None) as bar:
        def read(name: str):
            bar.update()
            return planned[name][1]()
        digest = write_checkpoint(out, {name: info for name, (info, _) in planned.items()}, read)
    write_sha256(Path(out), digest)
    return len(planned)


def sd_base(file: CheckpointFile, flag: str) -> tuple:
    """The networks of an SD-1.5 base file and where they are in it, checked.

    Returns:
        A patched UNet, not initialised, and the parts UNet without image attention, autoencoder and text encoder, in
        the order of SD15_MINDSPORE.
    """
    probe = ("input_blocks.1.0.in_layers.0.gamma", "input_blocks.1.0.in_layers.2.weight")
    layouts = SD15_TORCH if best_layout(file.tensors, probe, (UNET_SD15, UNET_TORCH)) is UNET_TORCH else SD15_MINDSPORE
    views = [View(file.tensors, layout) for layout in layouts]
    # Head counts and activations change no shape, so any will do for naming.
    sizes = unet_config(views[0], num_heads=8), autoencoder_config(views[1]), text_config(views[2], "quick_gelu")
    if None in sizes:
        family = "an SDXL file" if is_sdxl(file.tensors) else "not a whole SD-1.5 model"
        raise CheckpointError(f"{flag} {file.path}: is {family}, expected sd_v1.5-d0ab7146.ckpt or "
                              "v1-5-pruned-emaonly.safetensors")
    with no_init_parameters():
        unet, autoencoder, text = UNetModel(sizes[0]), AutoencoderKL(sizes[1]), CLIPTextTransformer(sizes[2])
        patch_cross_attention(unet)
    shapes = parameter_shapes(unet, TEXT_ONLY), parameter_shapes(autoencoder), parameter_shapes(text)
    parts = [Part(shape, file, layout) for shape, layout in zip(shapes, layouts)]
    check(parts, allowed=MERGED_EXTRAS if layouts is SD15_MINDSPORE else r"(?!)")
    return unet, parts


def plan_base(parts: list, dtype: str | None) -> dict:
    """How the parts of `sd_base` are written under MindSpore names."""
    planned = {}
    for part, target in zip(parts, SD15_MINDSPORE):
        planned.update(plan(part, target, dtype))
    return planned


def merge_sd(sd, open_clip_vit, ip_adapter, vae, out, controlnet=None, skip_ip: bool = False,
             dtype: str = "float32") -> int:
    """Merge SD-1.5, an image encoder, an adapter, an autoencoder and a ControlNet into one file.

    Args:
        sd: SD-1.5, MindSpore or original torch names, or a merged file.
        open_clip_vit: image encoder, Hugging Face names, or a merged file.
        ip_adapter: published adapter, or sd-N.ckpt of a finetuning; not read with `skip_ip`.
        vae: autoencoder, which takes the place of the one in `sd`; None keeps that.
        out: .ckpt or .safetensors to write.
        controlnet: ControlNet, diffusers' or original names; None for none.
        skip_ip: leave the projector out and let to_k_ip and to_v_ip start as to_k and to_v, to train from scratch.
        dtype: "float32" or "float16".

    Returns:
        How many tensors were written.

    Raises:
        CheckpointError: a file is not what it should be, or two do not fit together.
    """
    with ExitStack() as stack:
        def opened(path) -> CheckpointFile:
            return stack.enter_context(open_checkpoint(path))

        base = opened(sd)
        unet, parts = sd_base(base, "--sd")
        if vae is not None:
            parts[1] = vae_part(opened(vae))[1]
        planned = plan_base(parts, dtype)

        encoder, encoder_part = image_encoder_part(opened(open_clip_vit))
        planned.update(plan(encoder_part, image_encoder_mindspore(EMBEDDER_SD15), dtype))

        attention = parameter_shapes(unet, IMAGE_ATTENTION)
        if skip_ip:
            text = parts[0].layout
            start = Layout(text.prefix, ((r"\.to_([kv])_ip\.", r".to_\1."),) + text.renames)
            planned.update(plan(Part(attention, base, start), UNET_SD15, dtype))
        else:
            file = opened(ip_adapter)
            size, attention_layout, proj_layout = find_adapter(file, unet, encoder.config.embed_dim)
            with no_init_parameters():
                proj = parameter_shapes(ImageProjModel(size))
            adapter = Part(attention, file, attention_layout), Part(proj, file, proj_layout)
            check(adapter)
            planned.update(plan(adapter[0], UNET_SD15, dtype))
            planned.update(plan(adapter[1], image_proj_mindspore(EMBEDDER_SD15), dtype))

        if controlnet is not None:
            planned.update(plan(controlnet_part(opened(controlnet), unet.config)[1], CONTROLNET_SD15, dtype))
        return write_plan(out, planned, "merging")


def convert_sd(source, out, dtype: str | None = None) -> int:
    """Rewrite an original torch SD-1.5 file under MindSpore names.

    Args:
        source: v1-5-pruned-emaonly.safetensors or a model finetuned from it.
        out: .ckpt or .safetensors to write.
        dtype: "float32", "float16", or None to keep what it has.

    Returns:
        How many tensors were written.
    """
    with open_checkpoint(source) as file:
        _, parts = sd_base(file, "--source")
        return write_plan(out, plan_base(parts, dtype), "converting")
