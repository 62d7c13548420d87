"""The command line of the merge tools: one for each family, differing by defaults."""
from __future__ import annotations

import logging

from ip_adapter.cli import Parser, first_existing, start_logging
from ip_adapter.families import Family


def merge_tool(description: str, family: Family, defaults: dict, argv: list | None = None) -> None:
    """Parse the flags and merge.

    Args:
        description: of the tool.
        family: of the model.
        defaults: by the argument of `ip_adapter.merge.merge`; `base` is a list of spellings.
        argv: the words of the command line, None for those of this process.
    """
    parser = Parser(description)
    add = parser.add_argument
    add(family.base_flag, dest="base", default=defaults["base"], type=lambda text: [text],
        help=f"the base model: {family.base}")
    add("--open_clip_vit", default=defaults["open_clip_vit"], help="CLIP image encoder")
    add("--ip_adapter", "--ip_adpater", default=defaults["ip_adapter"], help=f"IP-Adapter: {family.adapter}")
    add("--vae", default=defaults["vae"], help="autoencoder, diffusers' or original layout" + (
        "" if defaults["vae"] else " (default: that of the base model)"))
    add("--controlnet", help="ControlNet, diffusers' or original layout")
    add("--skip_ip", action="store_true", help="no adapter: start to train one from scratch")
    add("--out", default=defaults["out"], help="file to write, .ckpt or .safetensors")
    add("--dtype", choices=["float32", "float16"], default="float32", help="precision of what is written")
    args = parser.parse_args(argv)
    start_logging()
    from ip_adapter.merge import merge  # MindSpore is imported once the flags are found good
    args.base = first_existing(args.base, family.base_flag)
    count = merge(family, **vars(args))
    logging.info("%d tensors merged into %s", count, args.out)
