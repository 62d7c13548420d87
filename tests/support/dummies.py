"""Dummy models that are smaller still, and lists of images."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ip_adapter.families import SD15, Family
from ip_adapter.weights.dummy import MINIATURE, MINIATURE_XL
from ip_adapter.weights.merging import merge
from ip_adapter.weights.parts import ModelSizes


def shallow(sizes: ModelSizes) -> ModelSizes:
    """The same with half of the blocks, for what scripts do with networks; numbers were recorded with all of them."""
    unet = replace(sizes.unet, channel_mult=(1, 2), transformer_depth=(0, 1), middle_depth=1)
    return replace(sizes, unet=unet, vae=replace(sizes.vae, num_res_blocks=1))


SHALLOW, SHALLOW_XL = shallow(MINIATURE), shallow(MINIATURE_XL)


def merged_file(folder: Path, standins: dict, family: Family = SD15) -> Path:
    """The checkpoint that stand-ins are merged into, under its usual name."""
    path = folder / {"SD-1.5": "sd_v1.5_ip_adapter.ckpt", "SDXL": "sd_xl_base_1.0_ms_ip_adapter.ckpt"}[family.name]
    merge(family, **standins, out=path)
    return path


def write_csv(folder, text: str, name: str = "img_txt.csv"):
    (folder / name).write_bytes(text.encode())
    return folder
