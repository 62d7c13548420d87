"""Merge SD-1.5, image encoder, IP-Adapter, autoencoder and ControlNet into the one file the SD scripts load.

python tools/merge_ckpts_sd.py
"""
from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, this folder is not a package

from ip_adapter.cli.script import run_script, watch_signals  # noqa: E402

watch_signals(__name__)

from ip_adapter.cli.merging import merge_tool  # noqa: E402
from ip_adapter.families import SD15  # noqa: E402

FOLDER = "checkpoints/sd_models"
DEFAULTS = {
    "base": [f"{FOLDER}/sd_v1.5_d0ab7146.ckpt", f"{FOLDER}/sd_v1.5-d0ab7146.ckpt"],
    "open_clip_vit": [f"{FOLDER}/IP-Adapter/image_encoder/model.safetensors"],
    "ip_adapter": [f"{FOLDER}/IP-Adapter/ip-adapter_sd15.safetensors"],
    "vae": [f"{FOLDER}/sd-vae-ft-mse/diffusion_pytorch_model.safetensors"],
    "out": f"{FOLDER}/merged/sd_v1.5_ip_adapter.ckpt",
}


def main(argv: list | None = None) -> None:
    """Parse the flags and merge."""
    merge_tool(__doc__, SD15, DEFAULTS, argv)


if __name__ == "__main__":
    run_script(main)
