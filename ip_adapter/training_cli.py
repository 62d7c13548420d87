"""Command lines of the training scripts: one flag for each setting of a configuration, and start-up."""
from __future__ import annotations

import argparse
import logging
import time
from dataclasses import fields
from pathlib import Path

from ip_adapter.cli import (
    Parser,
    add_config_flags,
    add_device_flags,
    boolean,
    config_from,
    number_of,
    one_of,
    start_logging,
)
from ip_adapter.config import STATE, TrainingConfig
from ip_adapter.families import SD15, SDXL, Family
from ldm.errors import UserError
from ldm.parallel import Group, join

# Configuration files of a family by --version, and of the demo model's networks by --part.
TRAINING = {SD15.name: {"1.5": "training/sd_v15_finetune_910b.yaml", "demo": "training/sd_demo_finetune.yaml"},
            SDXL.name: {"xl": "training/sd_xl_base_finetune_910b.yaml", "demo": "training/sd_xl_demo_finetune.yaml"}}
TIME, TIMES = "%Y.%m.%d-%H:%M:%S", "????.??.??-??:??:??"  # as {time} is written, and as a pattern of files
TRAINING_DEMO = {part: f"training/demo_{part}.yaml" for part in (
    "vae", "clip", "unet", "controlnet", "clip_xl", "unet_xl", "controlnet_xl")}


def training_script(description: str, family: Family, argv: list | None = None) -> None:
    """Parse the flags of a training script, build the model, train, save.

    Args:
        description: of the script.
        family: of the model.
        argv: the words of the command line, None for those of this process.
    """
    versions = TRAINING[family.name]
    version, config = config_from(argv, versions, TrainingConfig)
    args = training_parser(description, version, config, versions).parse_args(argv)
    group = start_training(args, family.finetuned)
    from ip_adapter.adapter_training import train_adapter
    from ip_adapter.training_run import own_folder
    with own_folder(args, group):
        train_adapter(args, config, family, group)


def training_parser(description: str, version: str, config: TrainingConfig, versions: dict,
                    flag: str = "--version") -> Parser:
    """The flags training scripts share: one for each setting of `config`, and where and how to run."""
    parser = Parser(description)
    for setting in fields(config):
        if "help" not in setting.metadata:
            continue
        default = getattr(config, setting.name)
        words = setting.metadata.get("words")
        kinds: dict = {bool: boolean, str: str}
        kind = one_of(*words) if words else kinds.get(type(default)) or number_of(TrainingConfig, setting.name)
        names = [f"--{name}" for name in (setting.name, *setting.metadata["aliases"])]
        parser.add_argument(*names, type=kind, default=default, help=setting.metadata["help"],
                            required=setting.name == "data_path" and not default)
    parser.add_argument("--resume", type=lambda text: boolean(text) if text.lower() in ("true", "false") else text,
                        default=False, help="go on where a run stopped: True for the last state in the output folder, "
                                            "or the path of a state")
    add_config_flags(parser, version, versions, flag)
    add_device_flags(parser, "0")
    return parser


def start_training(args: argparse.Namespace, name: str) -> Group:
    """Set up logging, device and mode of a training, check settings that depend on each other, meet other processes.

    Args:
        args: parsed flags; {time} in the output folder is filled in.
        name: of published files within the output folder.

    Returns:
        This process' place among those that train together.

    Raises:
        UserError: settings that do not fit together.
    """
    if args.cache_dir and args.random_crop:
        raise UserError("--random_crop True changes a picture every time, so --cache_dir cannot keep its features; "
                        "leave one of them out")
    if args.drop_image_prob + args.drop_text_prob + args.drop_both_prob > 1:
        raise UserError("--drop_image_prob, --drop_text_prob and --drop_both_prob add up to more than 1")
    if not (args.epochs or args.max_steps):
        raise UserError("--epochs 0 and --max_steps 0 together have no end; limit one of them")
    args.output_path = fill_in_time(args.output_path, name, args.resume is True)
    start_logging(args.log_level)
    from ldm.device import default_dtype, start_device  # MindSpore is imported once the flags are found good
    start_device(args.device_target, 0 if args.ms_mode is None else args.ms_mode, args.cpu_threads)
    args.dtype = args.dtype or default_dtype()
    group = join() if args.is_parallel else Group()
    if group.rank:
        logging.getLogger().setLevel("ERROR")  # rank 0 speaks for all
    return group


def fill_in_time(folder: str, name: str, resume: bool) -> str:
    """The output folder with {time} as YYYY.mm.DD-HH:MM:SS: now or, to resume, of the last run that saved a state."""
    if "{time}" not in folder:
        return folder
    before, after = folder.split("{time}", 1)
    state = Path(name).parent / STATE
    runs = sorted(Path(before or ".").glob(f"{TIMES}{after}/{state}")) if resume else []
    if runs:
        return str(runs[-1]).removesuffix(f"/{state}")
    return folder.replace("{time}", time.strftime(TIME))
