"""The command line of the merge tools: one for each family, differing by defaults."""
from __future__ import annotations

import logging

from ip_adapter.cli.parser import Parser, checkpoint_file, first_existing, output_checkpoint, start_logging
from ip_adapter.families import Family
from ldm.errors import UserError
from ldm.files import check_readable, printable


def merge_tool(description: str, family: Family, defaults: dict, argv: list | None = None) -> None:
    """Parse the flags and merge.

    Args:
        description: of the tool.
        family: of the model.
        defaults: by the argument of `ip_adapter.weights.merging.merge`; a source has a list of paths, of which one
            exists.
        argv: the words of the command line, None for those of this process.
    """
    sources = {"base": (family.base_flag, f"the base model: {family.base}"),
               "open_clip_vit": ("--open_clip_vit", "CLIP image encoder"),
               "ip_adapter": ("--ip_adapter", f"IP-Adapter: {family.adapter}"),
               "vae": ("--vae", "autoencoder, diffusers' or original layout"),
               "controlnet": ("--controlnet", "ControlNet, diffusers' or original layout")}
    parser = Parser(description)
    add = parser.add_argument
    for name, (flag, text) in sources.items():
        paths = defaults.get(name, [])
        told = " or ".join(paths) or ("that of the base model" if name == "vae" else "none")
        add(flag, *["--ip_adpater"] * (name == "ip_adapter"), dest=name, type=checkpoint_file,
            help=f"{text} (default: {told})")
    add("--skip_ip", action="store_true", help="no adapter: start to train one from scratch")
    add("--out", type=output_checkpoint, default=defaults["out"],
        help=f"file to write, .ckpt or .safetensors; what is there is replaced (default: {defaults['out']}, or, if a "
             "file with another image encoder, adapter or ControlNet is there, NAME.KIND.ckpt in its folder)")
    add("--dtype", choices=["float32", "float16"], default="float32", help="precision of what is written")
    args = parser.parse_args(argv)
    start_logging()
    if args.skip_ip and args.ip_adapter:
        raise UserError(f"--skip_ip leaves the adapter out, so --ip_adapter {printable(args.ip_adapter)} would not be "
                        "read; leave one of the two flags out")
    for name, (flag, _) in sources.items():
        if getattr(args, name) is None and defaults.get(name) and not (name == "ip_adapter" and args.skip_ip):
            setattr(args, name, check_readable(first_existing(defaults[name], flag), flag))
    from ip_adapter.weights.merging import merge  # MindSpore is imported once the flags are found good
    path, count = merge(family, **vars(args), keep_others="out" not in parser.given)
    logging.info("%d tensors merged into %s", count, path)
