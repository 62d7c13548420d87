"""What training changes in a model, and the files it is published in."""
from __future__ import annotations

import re
from pathlib import Path

from ip_adapter.names import IMAGE_ATTENTION
from ip_adapter.weights.loading import ImagePromptModel
from ip_adapter.weights.parts import adapter_layouts
from ldm.checkpoints.file import save_arrays


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
    layouts, paths = adapter_layouts(model.diffusion.unet, model.family), []
    for suffix, (attention, proj) in ((".ckpt", layouts["finetuned"]), (".safetensors", layouts["published"])):
        arrays = {}
        for name, value in trained.items():
            part, inner = name.split(".", 1)
            source = (attention if part == "unet" else proj).source(inner)
            for on_disk, (_, take) in source.disassemble(value.shape).items():
                arrays[on_disk] = take(value)
        paths.append(path.with_name(path.name + suffix))
        save_arrays(paths[-1], arrays)
    return paths
