"""Command lines of all scripts: how flags are read and checked, and what is answered to those nobody knows."""
from __future__ import annotations

import argparse
import difflib
import glob
import logging
import math
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Callable

from ip_adapter.config import MAX_SIZE, ROOT, InferenceConfig, load_config, setting_of
from ldm.errors import UserError
from ldm.files import check_folder, check_readable, check_writable, printable

# What other tools call things -> what is meant here, for flags that cannot simply be taken for one of ours.
MEANINGS = {
    "cfg": "scale", "cfg_scale": "scale", "guidance": "scale", "guidance_scale": "scale", "steps": "sampling_steps",
    "num_inference_steps": "sampling_steps", "num_steps": "sampling_steps", "ddim_steps": "sampling_steps",
    "height": "H", "width": "W", "h": "H", "w": "W", "resolution": "image_size", "size": "H",
    "checkpoint": "ckpt_path", "model": "ckpt_path", "ckpt": "ckpt_path", "weights": "ckpt_path",
    "pretrained_model_name_or_path": "pretrained_model_path", "base_model": "ckpt_path",
    "image": "img", "input": "img", "input_image": "img", "init_img": "ref_img", "init_image": "ref_img",
    "reference_image": "ref_img", "mask": "ref_mask", "mask_image": "ref_mask", "denoising_strength": "strength",
    "denoise": "strength", "ip_adapter_scale": "ip_scale", "adapter_scale": "ip_scale", "image_scale": "ip_scale",
    "outdir": "output_path", "output_dir": "output_path", "out": "output_path", "output": "output_path",
    "num_samples": "n_samples", "batch_size": "n_samples", "num_images_per_prompt": "n_samples", "n": "n_samples",
    "train_data_dir": "data_path", "learning_rate": "start_learning_rate", "lr": "start_learning_rate",
    "lr_scheduler": "scheduler", "lr_warmup_steps": "warmup_steps", "max_train_steps": "max_steps",
    "num_train_epochs": "epochs", "checkpointing_steps": "ckpt_save_interval", "resume_from_checkpoint": "resume",
    "mixed_precision": "dtype", "precision": "dtype", "fp16": "dtype", "device": "device_target",
    "controlnet_conditioning_scale": "control_scale", "control_weight": "control_scale", "hint": "control_image",
    "threads": "cpu_threads", "verbose": "log_level", "save_path": "output_path",
}


class _Help(argparse.RawDescriptionHelpFormatter):
    """Appends the default where there is one that a reader understands and the help does not explain it itself."""

    def _get_help_string(self, action: argparse.Action) -> str:
        told = action.default in (None, False, "", argparse.SUPPRESS) or isinstance(action.default, (list, tuple))
        if told or "(default: " in action.help or isinstance(action.default, str) and len(action.default) > 80:
            return action.help
        return f"{action.help} (default: {str(action.default).replace('%', '%%')})"


class Parser(argparse.ArgumentParser):
    """argparse with whole flag names only, defaults in the help, one-line errors, and the names of other tools.

    Args:
        description: of the script, whose examples stay on lines of their own.
        other_names: flags that other tools know -> those of this parser; they are taken without being listed one by
            one. Hyphens may stand for underscores everywhere.
        add_help: whether there is `-h`.

    Attributes:
        given: the destinations of the flags on the command line, once it is parsed.
    """

    def __init__(self, description: str, other_names: dict | None = None, add_help: bool = True):
        self.other_names, self.given = other_names or {}, ()
        also = f"Also taken, with hyphens or underscores: {', '.join(self.other_names)}." if other_names else None
        super().__init__(description=description, allow_abbrev=False, formatter_class=_Help, epilog=also,
                         usage="%(prog)s [flags]", add_help=add_help)

    def error(self, message: str):
        """Print one line and leave with status 2."""
        self.exit(2, f"{self.prog}: error: {printable(' '.join(message.split()))} (-h lists all flags)\n")

    def parse_args(self, args=None, namespace=None):
        """As argparse, but an unknown flag is answered with what may be meant."""
        words = self.own_names(sys.argv[1:] if args is None else args)
        for word in words:  # before argparse misses a required flag that stands there under another name
            if word.startswith("--") and word.split("=")[0] not in self._option_string_actions:
                self.error(f"unknown flag {word}{self.meant(word)}")
        known, unknown = self.parse_known_args(words, namespace)
        for word in unknown:
            self.error(f"unexpected argument {word!r}; put texts with spaces in quotes")
        self._note_given(words)
        return known

    def own_names(self, words) -> list:
        """The words of a command line with other tools' flags and hyphens replaced by the flags of this parser."""
        return [self._own_name(word) if word.startswith("--") else word for word in map(str, words)]

    def _own_name(self, word: str) -> str:
        flag, equals, value = word.partition("=")
        for name in (flag, flag.replace("-", "_").replace("__", "--", 1)):
            name = self.other_names.get(name, name)
            if name in self._option_string_actions:
                return name + equals + value
        return word

    def meant(self, word: str) -> str:
        """What an unknown flag may mean, as the end of a message; by its meaning first, then by its letters."""
        name = word.split("=")[0].lstrip("-").replace("-", "_")
        flags = self._option_string_actions
        known = [flag for flag in (*flags, *self.other_names) if flag.startswith("--")]
        near = difflib.get_close_matches(f"--{name}", known, 1, 0.75)
        same = f"--{MEANINGS.get(name.lower(), '')}"
        found = same if same in flags else self.other_names.get(near[0], near[0]) if near else None
        return f"; did you mean {found}?" if found else ""

    def _note_given(self, words: list) -> None:
        """Remember which flags were given; one that names a single input has to be given once: of two images one
        would be left out without a word."""
        flags = [self._option_string_actions.get(word.split("=")[0]) for word in words if word.startswith("--")]
        counts = Counter(action for action in flags if action is not None)
        for action, count in counts.items():
            if count > 1 and action.type is existing_file and isinstance(action, argparse._StoreAction):
                self.error(f"{action.option_strings[0]} is given {count} times, expected once; several files are not "
                           "taken here")
        self.given = tuple(action.dest for action in counts)


def in_range(kind: type, low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a finite number between `low` and `high`, both included."""
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a{' whole' * (kind is int)} number") from None
        if not (math.isfinite(value) and low <= value <= high):
            raise argparse.ArgumentTypeError(f"{text} is out of range, expected {low} to {high}")
        return value
    return parse


def multiple_of_8(text: str) -> int:
    """An argparse type: the height or width of a picture."""
    size = in_range(int, 8, MAX_SIZE)(text)
    if size % 8:
        below = size // 8 * 8
        raise argparse.ArgumentTypeError(f"{size} is not a multiple of 8; the nearest are {below} and {below + 8}")
    return size


def number_of(schema: type, name: str) -> Callable[[str], float]:
    """An argparse type: what the number of this name in a configuration may be."""
    setting = setting_of(schema, name)
    low, high, step, _ = setting.metadata["limits"]
    return multiple_of_8 if step == 8 else in_range(type(setting.default), low, high)


def boolean(text: str) -> bool:
    """An argparse type: True or False, as YAML and Python spell them."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


def one_of(*words: str) -> Callable[[str], str]:
    """An argparse type: one of these words; unlike `choices`, it also checks defaults."""
    def parse(text: str) -> str:
        if text not in words:
            raise argparse.ArgumentTypeError(f"{text!r} is not known, expected {' or '.join(words)}")
        return text
    return parse


def existing_file(text: str) -> Path:
    """An argparse type: a regular file that can be read."""
    return _checked(check_readable, text)


def checkpoint_file(text: str) -> Path:
    """An argparse type: a checkpoint; one that is not where it is said to be is looked for where the tools write it."""
    return _elsewhere(text) or existing_file(text)


def _elsewhere(text: str) -> Path | None:
    """The one file below checkpoints/ that has the name of a missing one, which is said; None if there is none."""
    if not text or os.path.lexists(text):
        return None
    found = sorted({path.resolve() for folder in dict.fromkeys((Path(), ROOT))
                    for path in folder.glob(f"checkpoints/**/{glob.escape(Path(text).name)}") if path.is_file()})
    if len(found) != 1:
        return None
    print(f"{printable(text)} does not exist; using {printable(found[0])}", file=sys.stderr)
    return found[0]


def existing_folder(text: str) -> Path:
    """An argparse type: a folder that can be listed."""
    return _checked(check_folder, text)


def output_file(text: str) -> Path:
    """An argparse type: a file that can be written, tried without leaving anything behind."""
    return _checked(check_writable, text)


def output_checkpoint(text: str) -> Path:
    """An argparse type: a checkpoint that can be written."""
    path = output_file(text)
    if path.suffix not in (".ckpt", ".safetensors"):
        raise argparse.ArgumentTypeError(f"{printable(path)} ends in '{printable(path.suffix)}', expected .ckpt or "
                                         ".safetensors")
    return path


def output_folder(text: str) -> Path:
    """An argparse type: a folder that can be written into or made, tried without leaving anything behind."""
    return _checked(lambda path, name: check_writable(path, name, folder=True), text)


def _checked(check: Callable, path: str) -> Path:
    try:
        return check(path, "")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).strip()) from None


def prompt(text: str) -> str:
    """An argparse type: a text in UTF-8, whatever the locale takes the command line's bytes for."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise argparse.ArgumentTypeError(f"{printable(text)!r} is not UTF-8 text") from None
        return text


def config_from(argv: list | None, versions: dict, schema: type = InferenceConfig, flag: str = "--version") -> tuple:
    """The configuration that `--version` and `--config` name, before the other flags take their defaults from it.

    Args:
        argv: the words of the command line, None for those of this process.
        versions: file below configs/ for each name of a version; the first is the default.
        schema: dataclass of the configuration.
        flag: that names one of them.

    Returns:
        The version's name and the configuration.
    """
    early = Parser("", add_help=False)
    add_config_flags(early, next(iter(versions)), versions, flag)
    args, _ = early.parse_known_args(sys.argv[1:] if argv is None else argv)
    return args.version, load_config(schema, args.config or ROOT / "configs" / versions[args.version])


def add_config_flags(parser: Parser, version: str, versions: dict, flag: str = "--version") -> None:
    """The flags that say where the defaults of all others come from."""
    parser.add_argument("--config", "--train_config", help="YAML file with the defaults of all this (default: by "
                                                           "--version)")
    what = {"--version": "which model: the published one, or the demo model that needs no download",
            "--part": "what of the demo model is trained"}[flag]
    parser.add_argument(flag, dest="version", choices=list(versions), default=version, help=what)


def add_device_flags(parser: Parser, modes: str) -> None:
    """Where and how networks run; `modes` says which `--ms_mode` is the default."""
    add = parser.add_argument
    add("--device_target", choices=["Ascend", "CPU"],
        help="where to run (default: Ascend if there is one, else CPU)")
    add("--ms_mode", "--mode", type=int, choices=[0, 1], help=f"0: compiled graphs, 1: PyNative (default: {modes})")
    add("--dtype", choices=["float16", "float32"],
        help="precision of the networks (default: float16 on Ascend, float32 on the CPU)")
    add("--cpu_threads", type=in_range(int, 0, 1024), default=0,
        help="threads that compute on the CPU, 0 for one a core, shared among the processes of a job")
    add("--log_level", choices=["debug", "info", "warning", "error"], default="info", help="how much is said")


def first_existing(paths, flag: str, advice: str = "name another") -> Path:
    """The first of `paths` that is a file, here or, for those that ship with the project, in its folder.

    A checkpoint that is not where it is said to be is looked for where the tools write it.

    Raises:
        UserError: none is.
    """
    for path in (Path(folder) / path for path in paths for folder in (".", ROOT)):
        if path.is_file():
            return path
    for path in filter(None, (_elsewhere(str(path)) for path in paths)):
        return path
    raise UserError(f"{flag}: no file {' or '.join(map(str, paths))}; {advice}")


class _Lines(logging.Formatter):
    """Messages as plain lines; control characters in names and prompts never reach the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(printable(line) for line in super().format(record).split("\n"))


def start_logging(level: str = "info") -> None:
    """Messages as plain lines on standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines("%(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
