"""Merging published files into the one .ckpt that the scripts load, and converting between torch and MindSpore names.

Tensors stream from source to target one by one, so memory stays near the largest tensor.
"""
from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from mindspore.nn.utils import no_init_parameters
from tqdm import tqdm

from ip_adapter.image_prompt import ImageProjModel, image_proj_config
from ip_adapter.names import (
    EMBEDDER_SD15,
    IMAGE_ATTENTION,
    IMAGE_ENCODER_TORCH,
    IMAGE_PROJ_TORCH,
    image_attention_torch,
    image_encoder_mindspore,
    image_proj_mindspore,
)
from ip_adapter.patch import patch_cross_attention, transformer_blocks
from ip_adapter.pictures import write_sha256
from ldm.architecture import autoencoder_config, image_config, is_sdxl, text_config, unet_config
from ldm.checkpoint import Layout, Part, View, best_layout, check, parameter_shapes, plan
from ldm.checkpoint_file import CheckpointError, CheckpointFile, open_checkpoint, write_checkpoint
from ldm.modules.autoencoder import AutoencoderKL
from ldm.modules.clip import CLIPImageTransformer, CLIPTextTransformer
from ldm.modules.unet import UNetModel
from ldm.names import TEXT_SD15, TEXT_TORCH, UNET_SD15, UNET_TORCH, VAE_DIFFUSERS, VAE_MINDSPORE, VAE_TORCH

TEXT_ONLY = r"^(?!.*\.to_[kv]_ip\.)"  # parameters of the UNet that are not image attention

# SD-1.5's base in its two spellings: UNet, autoencoder, text encoder.
SD15_TORCH = (UNET_TORCH, VAE_TORCH, TEXT_TORCH)
SD15_MINDSPORE = (UNET_SD15, VAE_MINDSPORE, TEXT_SD15)


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
        A patched UNet and an autoencoder (not initialised), and the parts UNet without image attention, autoencoder
        and text encoder, in the order of SD15_MINDSPORE.
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
    check(parts)
    return unet, autoencoder, parts


def plan_base(parts: list, dtype: str | None) -> dict:
    """How the parts of `sd_base` are written under MindSpore names."""
    planned = {}
    for part, target in zip(parts, SD15_MINDSPORE):
        planned.update(plan(part, target, dtype))
    return planned


def merge_sd(sd, open_clip_vit, ip_adapter, vae, out, skip_ip: bool = False, dtype: str = "float32") -> int:
    """Merge SD-1.5, an image encoder, an adapter and an autoencoder into one file.

    Args:
        sd: SD-1.5, MindSpore or original torch names.
        open_clip_vit: image encoder, Hugging Face names.
        ip_adapter: published adapter, or sd-N.ckpt of a finetuning; not read with `skip_ip`.
        vae: autoencoder of diffusers, which takes the place of the one in `sd`; None keeps that.
        out: .ckpt or .safetensors to write.
        skip_ip: leave the projector out and let to_k_ip and to_v_ip start as to_k and to_v, to train from scratch.
        dtype: "float32" or "float16".

    Returns:
        How many tensors were written.

    Raises:
        CheckpointError: a file is not what it should be, or two do not fit together.
    """
    with ExitStack() as stack:
        base = stack.enter_context(open_checkpoint(sd))
        unet, autoencoder, parts = sd_base(base, "--sd")
        if vae is not None:
            parts[1] = vae_part(stack.enter_context(open_checkpoint(vae)), autoencoder)
        planned = plan_base(parts, dtype)

        encoder, encoder_part = image_encoder_part(stack.enter_context(open_checkpoint(open_clip_vit)))
        planned.update(plan(encoder_part, image_encoder_mindspore(EMBEDDER_SD15), dtype))

        if skip_ip:
            text = parts[0].layout
            start = Layout(text.prefix, ((r"\.to_([kv])_ip\.", r".to_\1."),) + text.renames)
            planned.update(plan(Part(parameter_shapes(unet, IMAGE_ATTENTION), base, start), UNET_SD15, dtype))
        else:
            adapter = stack.enter_context(open_checkpoint(ip_adapter))
            attention, proj = adapter_parts(adapter, unet, encoder.config.embed_dim)
            planned.update(plan(attention, UNET_SD15, dtype))
            planned.update(plan(proj, image_proj_mindspore(EMBEDDER_SD15), dtype))
        return write_plan(out, planned, "merging")


def vae_part(file: CheckpointFile, autoencoder: AutoencoderKL) -> Part:
    """An autoencoder file in either spelling, checked."""
    paths = parameter_shapes(autoencoder)
    part = Part(paths, file, best_layout(file.tensors, paths, VAE_DIFFUSERS + (VAE_MINDSPORE, VAE_TORCH)))
    check([part], cause="--vae expects the autoencoder of diffusers, such as sd-vae-ft-mse")
    return part


def image_encoder_part(file: CheckpointFile) -> tuple:
    """The image encoder in a Hugging Face file, not initialised, and its checked part."""
    size = image_config(View(file.tensors, IMAGE_ENCODER_TORCH))
    if size is None:
        raise CheckpointError(f"--open_clip_vit {file.path}: holds no image encoder; expected "
                              "IP-Adapter's image_encoder/model.safetensors")
    with no_init_parameters():
        encoder = CLIPImageTransformer(size)
    part = Part(parameter_shapes(encoder), file, IMAGE_ENCODER_TORCH)
    check([part])
    return encoder, part


def adapter_parts(file: CheckpointFile, unet: UNetModel, embed_dim: int, flag: str = "--ip_adapter") -> tuple:
    """Image attention and projector of an adapter, published or finetuned, checked against UNet and encoder.

    Raises:
        CheckpointError: it is of another kind, or was trained with another image encoder or base model.
    """
    paths = [path for path, _ in transformer_blocks(unet)]
    published = image_attention_torch(paths), IMAGE_PROJ_TORCH
    finetuned = UNET_SD15, image_proj_mindspore(EMBEDDER_SD15)
    shapes = parameter_shapes(unet, IMAGE_ATTENTION)
    best = best_layout(file.tensors, shapes, (finetuned[0], published[0]))
    attention, proj = published if best is published[0] else finetuned
    size = image_proj_config(View(file.tensors, proj))
    if size is None:
        plus = any(name.startswith(("image_proj.latents", "image_proj.proj.0")) for name in file.tensors)
        raise CheckpointError(f"{flag} {file.path}: " + (
            "is a plus or full-face adapter; only the plain ones, with 4 tokens of the image embedding, are supported"
            if plus else "holds no adapter; expected ip-adapter_sd15.safetensors or a finetuned sd-N.ckpt"))
    encoders = {1024: "ViT-H (1024)", 1280: "ViT-bigG (1280)"}
    if size.embed_dim != embed_dim:
        trained = encoders.get(size.embed_dim, f"an encoder of width {size.embed_dim}")
        given = encoders.get(embed_dim, f"of width {embed_dim}")
        raise CheckpointError(f"{flag} {file.path}: this adapter was trained with {trained}; "
                              f"the encoder given is {given}")
    if size.context_dim != unet.config.context_dim:
        raise CheckpointError(f"{flag} {file.path}: this adapter makes tokens of width {size.context_dim}, the UNet "
                              f"takes {unet.config.context_dim}; it was trained for another base model")
    with no_init_parameters():
        model = ImageProjModel(size)
    parts = Part(shapes, file, attention), Part(parameter_shapes(model), file, proj)
    check(parts)
    return parts


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
        _, _, parts = sd_base(file, "--source")
        return write_plan(out, plan_base(parts, dtype), "converting")
