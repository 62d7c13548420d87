"""Merge SD-1.5, image encoder, IP-Adapter, autoencoder and ControlNet into the one file the SD scripts load.

python tools/merge_ckpts_sd.py
"""
from __future__ import annotations

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, this folder is not a package

from ip_adapter.cli import Parser, execute, first_existing, start_logging  # noqa: E402
from ip_adapter.merge import merge_sd  # noqa: E402

FOLDER = "checkpoints/sd_models"
SPELLINGS = [f"{FOLDER}/sd_v1.5_d0ab7146.ckpt", f"{FOLDER}/sd_v1.5-d0ab7146.ckpt"]


def main(argv: list | None = None) -> None:
    """Parse the flags and merge."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--sd", default=SPELLINGS, type=lambda text: [text],
        help="Stable Diffusion 1.5, MindSpore .ckpt or original .safetensors")
    add("--open_clip_vit", default=f"{FOLDER}/IP-Adapter/image_encoder/model.safetensors", help="CLIP image encoder")
    add("--ip_adapter", "--ip_adpater", default=f"{FOLDER}/IP-Adapter/ip-adapter_sd15.safetensors",
        help="IP-Adapter, published (.safetensors, .bin) or finetuned (sd-N.ckpt)")
    add("--vae", default=f"{FOLDER}/sd-vae-ft-mse/diffusion_pytorch_model.safetensors",
        help="autoencoder, diffusers' or original layout")
    add("--controlnet", help="ControlNet, diffusers' or original layout")
    add("--skip_ip", action="store_true", help="no adapter: start to train one from scratch")
    add("--out", default=f"{FOLDER}/merged/sd_v1.5_ip_adapter.ckpt", help="file to write, .ckpt or .safetensors")
    add("--dtype", choices=["float32", "float16"], default="float32", help="precision of what is written")
    args = parser.parse_args(argv)
    start_logging()
    sd = first_existing(args.sd, "--sd")
    count = merge_sd(sd, args.open_clip_vit, args.ip_adapter, args.vae, args.out, args.controlnet, args.skip_ip,
                     args.dtype)
    logging.info("%d tensors merged into %s", count, args.out)


if __name__ == "__main__":
    execute(main)
