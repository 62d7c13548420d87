"""Rewrite an original torch checkpoint of Stable Diffusion 1.5 under MindSpore names.

python tools/convert_checkpoint.py --source v1-5-pruned-emaonly.safetensors \
    --out checkpoints/sd_models/sd_v1.5-d0ab7146.ckpt
"""
from __future__ import annotations

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, this folder is not a package

from ip_adapter.cli.script import run_script, watch_signals  # noqa: E402

watch_signals(__name__)

from ip_adapter.cli.parser import Parser, checkpoint_file, output_checkpoint, start_logging  # noqa: E402


def main(argv: list | None = None) -> None:
    """Parse the flags and convert."""
    parser = Parser(__doc__)
    parser.add_argument("--source", type=checkpoint_file, required=True, help="the original .safetensors")
    parser.add_argument("--out", type=output_checkpoint, required=True,
                        help="file to write, .ckpt or .safetensors; what is there is replaced")
    parser.add_argument("--dtype", choices=["float32", "float16"],
                        help="precision of what is written (default: that of the source)")
    args = parser.parse_args(argv)
    start_logging()
    from ip_adapter.weights.merging import convert  # MindSpore is imported once the flags are found good
    path, count = convert(args.source, args.out, args.dtype)
    logging.info("%d tensors converted into %s", count, path)


if __name__ == "__main__":
    run_script(main)
