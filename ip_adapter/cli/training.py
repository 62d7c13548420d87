"""Command lines of the training scripts: one flag for each setting of a configuration, and start-up."""
from __future__ import annotations

import argparse
import glob
import logging
import time
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Iterable, NamedTuple

from ip_adapter.cli.parser import (
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
from ldm.files import printable
from ldm.parallel import Group, job_size, join

if TYPE_CHECKING:
    from ip_adapter.data.dataset import ImageTextDataset

# Configuration files of a family by --version, and of the demo model's networks by --part.
TRAINING = {SD15.name: {"1.5": "training/sd_v15_finetune_910b.yaml", "demo": "training/sd_demo_finetune.yaml"},
            SDXL.name: {"xl": "training/sd_xl_base_finetune_910b.yaml", "demo": "training/sd_xl_demo_finetune.yaml"}}
TIME, TIMES = "%Y.%m.%d-%H:%M:%S", "????.??.??-??:??:??"  # as {time} is written, and as a pattern of files
TRAINING_DEMO = {part: f"training/demo_{part}.yaml" for part in (
    "vae", "clip", "unet", "controlnet", "clip_xl", "unet_xl", "controlnet_xl")}


class Idle(NamedTuple):
    """A setting that is of no effect beside others."""

    setting: str
    when: Callable[[argparse.Namespace], bool]
    why: str  # names the other setting


def _float32(args: argparse.Namespace) -> bool:
    """Whether networks run in float32, as far as is known before MindSpore is imported."""
    on_cpu = args.device_target == "CPU" or not args.device_target and not glob.glob("/dev/davinci*")
    return args.dtype == "float32" or not args.dtype and on_cpu


UNSCALED = "the loss is scaled with --dtype float16 only, and this training is in float32"
SILENT = "without --validation_interval no validation images are made"
IDLE = (
    Idle("recompute", lambda args: args.ms_mode == 1,
         "with --ms_mode 1 (PyNative) all activations are kept; only graphs (--ms_mode 0) compute them again"),
    Idle("random_crop", lambda args: bool(args.cache_dir),
         "it changes an image every time, so --cache_dir cannot keep its features"),
    Idle("validation_data", lambda args: not args.validation_interval, SILENT),
    Idle("validation_count", lambda args: not args.validation_interval, SILENT),
    Idle("validation_steps", lambda args: not args.validation_interval, SILENT),
    Idle("validation_interval", lambda args: 0 < args.max_steps < args.validation_interval,
         "the training ends at --max_steps before the first validation"),
    Idle("end_learning_rate", lambda args: args.scheduler != "cosine",
         "the learning rate falls with --scheduler cosine only, and --scheduler is constant"),
    Idle("init_loss_scale", _float32, UNSCALED),
    Idle("loss_scale_factor", _float32, UNSCALED),
    Idle("scale_window", _float32, UNSCALED),
    Idle("cpu_threads", lambda args: args.device_target == "Ascend", "nothing is computed on the CPU with "
         "--device_target Ascend"),
    Idle("open_clip_vit", lambda args: bool(args.pretrained_model_path),
         "it is for seeded weights, and --pretrained_model_path names others"),
)


def training_script(description: str, family: Family, argv: list | None = None) -> None:
    """Parse the flags of a training script, build the model, train, save.

    Args:
        description: of the script.
        family: of the model.
        argv: the words of the command line, None for those of this process.
    """
    versions = TRAINING[family.name]
    version, config = config_from(argv, versions, TrainingConfig)
    parser = training_parser(description, version, config, versions)
    args = parser.parse_args(argv)
    dataset, group = start_training(args, parser.given, family.finetuned)
    from ip_adapter.training.adapter import train_adapter
    from ip_adapter.training.loop import own_folder
    with own_folder(args, group):
        train_adapter(args, config, family, dataset, group)


def training_parser(description: str, version: str, config: TrainingConfig, versions: dict,
                    flag: str = "--version", unused: tuple = ()) -> Parser:
    """The flags training scripts share: one for each setting of `config`, and where and how to run.

    Args:
        description: of the script.
        version: value of `flag`.
        config: the defaults.
        versions: values that `flag` may have.
        flag: that names the configuration.
        unused: settings that are of no effect there: they get no flags, and are 0, False or empty.

    Raises:
        UserError: the configuration sets one of those.
    """
    parser = Parser(description)
    for setting in fields(config):
        if "help" not in setting.metadata:
            continue
        default = getattr(config, setting.name)
        if setting.name in unused:
            if default != setting.default:
                raise UserError(f"--config: {setting.name} is of no effect with {flag} {version}; remove it")
            parser.set_defaults(**{setting.name: type(default)()})
            continue
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


def start_training(args: argparse.Namespace, given: Iterable[str], name: str) -> tuple[ImageTextDataset, Group]:
    """Check all that can be known without the model, set up logging, device and mode, meet other processes.

    Args:
        args: parsed flags; {time} in the output folder is filled in.
        given: settings on the command line.
        name: of published files within the output folder.

    Returns:
        The data set, and this process' place among those that train together.

    Raises:
        UserError: settings that do not fit together or are of no effect, no data set, a folder that is in use.
    """
    if args.drop_image_prob + args.drop_text_prob + args.drop_both_prob > 1:
        raise UserError("--drop_image_prob, --drop_text_prob and --drop_both_prob add up to more than 1")
    if not (args.epochs or args.max_steps):
        raise UserError("--epochs 0 and --max_steps 0 together have no end; limit one of them")
    check_idle(args, given)
    args.output_path = fill_in_time(args.output_path, name, args.resume is True)
    start_logging(args.log_level)
    from ip_adapter.data.dataset import ImageTextDataset  # not MindSpore: it is imported once all this is found good
    from ip_adapter.training.plan import plan, state_to_resume
    dataset = ImageTextDataset(args.data_path, args.image_size, args.random_crop, args.max_broken)
    state_to_resume(args, name, plan(args, len(dataset), job_size() if args.is_parallel else 1))
    from ldm.device import default_dtype, start_device
    start_device(args.device_target, 0 if args.ms_mode is None else args.ms_mode, args.cpu_threads)
    args.dtype = args.dtype or default_dtype()
    group = join() if args.is_parallel else Group()
    if group.rank:
        logging.getLogger().setLevel("ERROR")  # rank 0 speaks for all
    return dataset, group


def check_idle(args: argparse.Namespace, given: Iterable[str]) -> None:
    """Find settings that can be of no effect; those that are 0, False or empty, or nobody has set, do not count.

    Args:
        args: parsed flags.
        given: settings on the command line. In a configuration file those count that differ from the usual.

    Raises:
        UserError: there is one.
    """
    for idle in IDLE:
        value = getattr(args, idle.setting, None)
        asked = idle.setting in given or value != getattr(TrainingConfig, idle.setting, None)
        if value and asked and idle.when(args):
            raise UserError(f"--{idle.setting} {printable(value)} is of no effect: {idle.why}; leave it out, or "
                            "change that")


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
