"""Merging published files into the one .ckpt that the scripts load, and converting between torch and MindSpore names.

Tensors stream from source to target one by one, so memory stays near the largest tensor.
"""
from __future__ import annotations

import logging
import re
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from mindspore.nn.utils import no_init_parameters
from tqdm import tqdm

from ip_adapter.families import Family, family_of
from ip_adapter.image_prompt import ImageProjModel
from ip_adapter.images.saving import remember_sha256
from ip_adapter.names import IMAGE_ATTENTION, TEXT_ONLY
from ip_adapter.patch import patch_cross_attention
from ip_adapter.weights.parts import (
    check_channels,
    controlnet_part,
    find_adapter,
    image_encoder_part,
    kind_of_file,
    merged_kind,
    vae_part,
)
from ldm.checkpoints.architecture import autoencoder_config, text_config, unet_config
from ldm.checkpoints.file import CheckpointError, CheckpointFile, open_checkpoint, write_checkpoint
from ldm.checkpoints.layout import Layout
from ldm.checkpoints.loading import Part, View, best_layout, check, parameter_shapes, plan
from ldm.checkpoints.names import without_text_model
from ldm.files import check_apart, printable
from ldm.modules.autoencoder import AutoencoderKL
from ldm.modules.clip import CLIPTextTransformer
from ldm.modules.unet import UNetModel

log = logging.getLogger(__name__)


class Written(NamedTuple):
    """A file that was written.

    Attributes:
        path: where.
        tensors: how many it holds.
    """

    path: Path
    tensors: int


def write_plan(out: Path, planned: dict, description: str, sources: dict) -> Written:
    """Write what `plan` describes, with a progress bar; a line says which file it replaces.

    The file's sha256 is remembered in the user's cache; nothing but the file is written into its folder.

    Args:
        out: .ckpt or .safetensors to write.
        planned: as `plan` returns it.
        description: of the work, for the progress bar.
        sources: flag -> file that is read.

    Raises:
        UserError: `out` is one of the sources.
    """
    check_apart(out, "--out", sources)
    if out.exists():
        stat = out.stat()
        log.info("replacing %s (%s; %s, of %s)", printable(out), kind_of_file(out) or "no checkpoint that can be read",
                 f"{stat.st_size / 1e9:.1f} GB" if stat.st_size >= 1e9 else f"{stat.st_size / 1e6:.1f} MB",
                 time.strftime("%Y-%m-%d %H:%M", time.localtime(stat.st_mtime)))
    with tqdm(total=len(planned), desc=description, unit=" tensors", disable=None) as bar:
        def read(name: str):
            bar.update()
            return planned[name][1]()
        digest = write_checkpoint(out, {name: info for name, (info, _) in planned.items()}, read)
    remember_sha256(out, digest)
    return Written(out, len(planned))


def place_by_kind(out: Path, planned: dict) -> Path:
    """Where a merged file goes: to `out`, or to NAME.KIND.ckpt in its folder if `out` is a file of another kind."""
    kind, there = merged_kind({name: info for name, (info, _) in planned.items()}), kind_of_file(out)
    if there in (None, kind):
        return out
    place = out.with_name(f"{out.stem}.{kind.suffix()}{out.suffix}")
    log.info("%s is kept (%s); this merge (%s) goes to %s", printable(out), there, kind, printable(place.name))
    return place


def base_layouts(tensors: dict, family: Family) -> tuple:
    """Layouts of the parts of a base file: the family's for MindSpore, or the original ones as the file spells them."""
    probe = ("input_blocks.1.0.in_layers.0.gamma", "input_blocks.1.0.in_layers.2.weight")
    mindspore, torch = family.mindspore, family.torch
    if best_layout(tensors, probe, (mindspore[0], torch[0])) is mindspore[0]:
        return mindspore
    return tuple(best_layout(tensors, ("token_embedding",), (layout, without_text_model(layout))) for layout in torch)


def base_parts(file: CheckpointFile, family: Family, flag: str, vae: CheckpointFile | None = None) -> tuple:
    """The networks of a base file and where they are in it, checked.

    Args:
        file: the whole model.
        family: of the model.
        flag: that names the file, for messages.
        vae: holds the autoencoder that replaces the one in `file`, which then may be any or missing.

    Returns:
        A patched UNet, not initialised, and the parts UNet without image attention, autoencoder and text encoders, in
        the order of `Family.mindspore`.
    """
    layouts = base_layouts(file.tensors, family)
    views = [View(file.tensors, layout) for layout in layouts]
    # Head counts change no shape, so any will do for naming.
    unet_size, vae_size = unet_config(views[0], num_heads=8), autoencoder_config(views[1])
    text_sizes = [text_config(view, activation) for view, activation in zip(views[2:], family.activations)]
    found, where = family_of(file.tensors), f"{flag} {file.path}"
    needed = [unet_size, *text_sizes] + ([vae_size] if vae is None else [])
    if None in needed or found is not family:
        what = f"an {found.name} file" if found is not family and unet_size else "not a whole model"
        raise CheckpointError(f"{where}: is {what}, expected {family.base}")
    check_channels(where, unet_size, vae_size if vae is None else None)
    with no_init_parameters():
        unet, texts = UNetModel(unet_size), [CLIPTextTransformer(size) for size in text_sizes]
        patch_cross_attention(unet)
    shapes = [parameter_shapes(unet, TEXT_ONLY)] + [parameter_shapes(text) for text in texts]
    for name in family.carried:
        if name in views[-1]:
            shapes[-1][name] = views[-1].shape(name)
    parts = [Part(shape, file, layout) for shape, layout in zip(shapes, (layouts[0], *layouts[2:]))]
    allowed = family.merged_extras if layouts is family.mindspore else r"(?!)"
    if vae is not None:
        check(parts, rf"{allowed}|^{re.escape(layouts[1].prefix)}")
        parts.insert(1, vae_part(vae, unet.config)[1])
        return unet, parts
    with no_init_parameters():
        parts.insert(1, Part(parameter_shapes(AutoencoderKL(vae_size)), file, layouts[1]))
    check(parts, allowed)
    return unet, parts


def plan_base(parts: list, family: Family, dtype: str | None) -> dict:
    """How the parts of `base_parts` are written under MindSpore names."""
    planned = {}
    for part, target in zip(parts, family.mindspore):
        planned.update(plan(part, target, dtype))
    return planned


def merge(family: Family, base, open_clip_vit, ip_adapter, vae, out, controlnet=None, skip_ip: bool = False,
          dtype: str = "float32", keep_others: bool = False) -> Written:
    """Merge a base model, an image encoder, an adapter, an autoencoder and a ControlNet into one file.

    Args:
        family: of the model.
        base: the whole model, MindSpore or original torch names, or a merged file.
        open_clip_vit: image encoder, Hugging Face names, or a merged file.
        ip_adapter: published adapter, or that of a finetuning; not read with `skip_ip`.
        vae: autoencoder, which takes the place of the one in `base`; None keeps that.
        out: .ckpt or .safetensors to write.
        controlnet: ControlNet, diffusers' or original names; None for none.
        skip_ip: leave the projector out and let to_k_ip and to_v_ip start as to_k and to_v, to train from scratch.
        dtype: "float32" or "float16".
        keep_others: whether a file at `out` of another kind (image encoder, adapter, ControlNet) is kept, and the
            merged file named after its kind.

    Raises:
        CheckpointError: a file is not what it should be, or two do not fit together.
        UserError: `out` is one of the files that are read.
    """
    sources = {family.base_flag: base, "--open_clip_vit": open_clip_vit, "--ip_adapter": ip_adapter, "--vae": vae,
               "--controlnet": controlnet}
    with ExitStack() as stack:
        def opened(path) -> CheckpointFile:
            return stack.enter_context(open_checkpoint(path))

        base = opened(base)
        unet, parts = base_parts(base, family, family.base_flag, None if vae is None else opened(vae))
        planned = plan_base(parts, family, dtype)

        encoder, encoder_part = image_encoder_part(opened(open_clip_vit))
        planned.update(plan(encoder_part, family.image_encoder, dtype))

        attention = parameter_shapes(unet, IMAGE_ATTENTION)
        if skip_ip:
            text = parts[0].layout
            start = Layout(text.prefix, ((r"\.to_([kv])_ip\.", r".to_\1."),) + text.renames)
            planned.update(plan(Part(attention, base, start), family.mindspore[0], dtype))
        else:
            file = opened(ip_adapter)
            size, attention_layout, proj_layout = find_adapter(file, unet, encoder.config.embed_dim, family)
            with no_init_parameters():
                proj = parameter_shapes(ImageProjModel(size))
            adapter = Part(attention, file, attention_layout), Part(proj, file, proj_layout)
            check(adapter)
            planned.update(plan(adapter[0], family.mindspore[0], dtype))
            planned.update(plan(adapter[1], family.image_proj, dtype))

        if controlnet is not None:
            planned.update(plan(controlnet_part(opened(controlnet), unet.config, family)[1], family.controlnet, dtype))
        place = place_by_kind(Path(out), planned) if keep_others else Path(out)
        return write_plan(place, planned, "merging", sources)


def convert(source, out, dtype: str | None = None) -> Written:
    """Rewrite an original torch file of either family under MindSpore names.

    Args:
        source: v1-5-pruned-emaonly.safetensors, sd_xl_base_1.0.safetensors, or a model finetuned from one of them.
        out: .ckpt or .safetensors to write.
        dtype: "float32", "float16", or None to keep what it has.

    Raises:
        CheckpointError: the source is no whole model.
        UserError: `out` is the source.
    """
    with open_checkpoint(source) as file:
        family = family_of(file.tensors)
        _, parts = base_parts(file, family, "--source")
        return write_plan(Path(out), plan_base(parts, family, dtype), "converting", {"--source": source})
