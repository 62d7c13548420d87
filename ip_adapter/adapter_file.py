"""What training changes in a model, and the files it is published in."""
from __future__ import annotations

import re
from pathlib import Path

from ip_adapter.build import ImagePromptModel
from ip_adapter.names import (
    EMBEDDER_SD15,
    IMAGE_ATTENTION,
    IMAGE_PROJ_TORCH,
    image_attention_torch,
    image_proj_mindspore,
)
from ip_adapter.patch import transformer_blocks
from ldm.checkpoint_file import save_arrays
from ldm.names import UNET_SD15


def adapter_parameters(model: ImagePromptModel) -> dict:
    """Name -> parameter of the image attention (`unet.`) and the projector (`image_proj.`)."""
    unet = {f"unet.{path}": parameter for path, parameter in model.diffusion.unet.parameters_and_names()
            if re.search(IMAGE_ATTENTION, path)}
    proj = {f"image_proj.{path}": parameter for path, parameter in model.embedder.image_proj.parameters_and_names()}
    return {**unet, **proj}


def save_adapter(path: Path, trained: dict, model: ImagePromptModel) -> list:
    """Write an adapter twice: for this project, and as tencent's code, diffusers and ComfyUI load it.

    Args:
        path: without a suffix; `.ckpt` and `.safetensors` are added.
        trained: name -> array, named as by `adapter_parameters`.
        model: which it belongs to.

    Returns:
        The two paths.
    """
    blocks = [block for block, _ in transformer_blocks(model.diffusion.unet)]
    layouts = {".ckpt": {"unet": UNET_SD15, "image_proj": image_proj_mindspore(EMBEDDER_SD15)},
               ".safetensors": {"unet": image_attention_torch(blocks), "image_proj": IMAGE_PROJ_TORCH}}
    paths = []
    for suffix, layout in layouts.items():
        arrays = {}
        for name, value in trained.items():
            part, inner = name.split(".", 1)
            for on_disk, (_, take) in layout[part].source(inner).disassemble(value.shape).items():
                arrays[on_disk] = take(value)
        paths.append(path.with_name(path.name + suffix))
        save_arrays(paths[-1], arrays)
    return paths
