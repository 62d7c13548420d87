"""Train an IP-Adapter for Stable Diffusion 1.5, from scratch or further, on images with captions.

python train_sd.py --data_path datasets/pokemon_blip/train \
    --pretrained_model_path checkpoints/sd_models/merged/sd_v1.5_ip_adapter.ckpt
"""
from __future__ import annotations

from ip_adapter.cli.script import run_script


def main(argv: list | None = None) -> None:
    """Parse the flags, build the model, train, save."""
    from ip_adapter.cli.training import training_script
    from ip_adapter.families import SD15
    training_script(__doc__, SD15, argv)


if __name__ == "__main__":
    run_script(main)
