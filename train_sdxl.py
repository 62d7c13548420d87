"""Train an IP-Adapter for SDXL, from scratch or further, on pictures with captions.

python train_sdxl.py --data_path datasets/pokemon_blip/train \
    --weight checkpoints/sdxl_models/merged/sd_xl_base_1.0_ms_ip_adapter.ckpt
"""
from __future__ import annotations

from ip_adapter.adapter_training import training_script
from ip_adapter.families import SDXL
from ip_adapter.script import run_script


def main(argv: list | None = None) -> None:
    """Parse the flags, build the model, train, save."""
    training_script(__doc__, SDXL, argv)


if __name__ == "__main__":
    run_script(main)
