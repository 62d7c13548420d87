"""Train an IP-Adapter for SDXL, from scratch or further, on images with captions.

python train_sdxl.py --data_path datasets/pokemon_blip/train \
    --weight checkpoints/sdxl_models/merged/sd_xl_base_1.0_ms_ip_adapter.ckpt
"""
from __future__ import annotations

from ip_adapter.cli.script import run_script


def main(argv: list | None = None) -> None:
    """Parse the flags, build the model, train, save."""
    from ip_adapter.cli.training import training_script
    from ip_adapter.families import SDXL
    training_script(__doc__, SDXL, argv)


if __name__ == "__main__":
    run_script(main)
