"""A whole model written as one merged checkpoint, such as the stages of the demo model."""
from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from mindspore import nn

from ip_adapter.names import TEXT_ONLY
from ip_adapter.weights.loading import ImagePromptModel
from ldm.checkpoints.file import save_arrays
from ldm.checkpoints.layout import Layout
from ldm.checkpoints.loading import parameter_shapes
from ldm.modules.weight import stored_shape


def networks(model: ImagePromptModel) -> dict:
    """Name -> (network, its layout in a merged file); the projector is left out, for adapters are trained later."""
    diffusion, family = model.diffusion, model.family
    unet, vae, *texts = family.mindspore
    parts = {"unet": (diffusion.unet, unet), "vae": (diffusion.vae, vae),
             **{f"text{n}": pair for n, pair in enumerate(zip(diffusion.text_encoders, texts))},
             "image": (model.embedder.image_encoder, family.image_encoder)}
    if diffusion.controlnets:
        parts["controlnet"] = diffusion.controlnets[0], family.controlnet
    return parts


def network_parameters(cells: dict) -> dict:
    """`name.path` -> parameter, of cells by name; image attention is left out."""
    return {f"{name}.{path}": parameter for name, cell in cells.items() for path, parameter in _held(cell)}


def save_model(path: Path, model: ImagePromptModel, trained: dict) -> list:
    """Write a checkpoint in float16, as the merge tools make them with --skip_ip.

    Args:
        path: without the suffix; `.ckpt` is added.
        model: its UNet without image attention, which starts as a copy of the text attention.
        trained: `name.path` -> array, in place of the network's own value.

    Returns:
        The path, in a list.
    """
    arrays = {}
    for name, (cell, layout) in networks(model).items():
        for inner, value in _values(cell, name, trained).items():
            copies = [inner]
            if name == "unet" and re.search(r"\.attn2\.to_[kv]\.", inner):
                copies.append(re.sub(r"\.to_([kv])\.", r".to_\1_ip.", inner))
            for copy in copies:
                arrays.update(_on_disk(layout, copy, value))
    path = path.with_name(path.name + ".ckpt")
    save_arrays(path, arrays)
    return [path]


def _held(cell: nn.Cell) -> list:
    """(path, parameter) of all that files hold, but for image attention."""
    shapes = parameter_shapes(cell, TEXT_ONLY)
    return [(path, parameter) for path, parameter in cell.parameters_and_names() if path in shapes]


def _values(cell: nn.Cell, name: str, trained: dict) -> dict:
    return {path: trained.get(f"{name}.{path}", parameter.asnumpy()).reshape(stored_shape(parameter))
            for path, parameter in _held(cell)}


def _on_disk(layout: Layout, path: str, value: np.ndarray) -> dict:
    value = value.astype(np.float16)
    return {name: take(value) for name, (_, take) in layout.source(path).disassemble(value.shape).items()}
