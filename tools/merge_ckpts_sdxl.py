"""Merge SDXL, image encoder, IP-Adapter and ControlNet into the one file the SDXL scripts load.

python tools/merge_ckpts_sdxl.py
"""
from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, this folder is not a package

from ip_adapter.cli.script import run_script, watch_signals  # noqa: E402

watch_signals(__name__)

from ip_adapter.cli.merging import merge_tool  # noqa: E402
from ip_adapter.families import SDXL  # noqa: E402

FOLDER = "checkpoints/sdxl_models"
DEFAULTS = {
    "base": [f"{FOLDER}/sd_xl_base_1.0_ms.ckpt"],
    "open_clip_vit": [f"{FOLDER}/IP-Adapter/image_encoder/model.safetensors"],
    "ip_adapter": [f"{FOLDER}/IP-Adapter/ip-adapter_sdxl.safetensors"],
    "out": f"{FOLDER}/merged/sd_xl_base_1.0_ms_ip_adapter.ckpt",
}


def main(argv: list | None = None) -> None:
    """Parse the flags and merge."""
    merge_tool(__doc__, SDXL, DEFAULTS, argv)


if __name__ == "__main__":
    run_script(main)
