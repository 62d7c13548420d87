"""Command lines of all scripts: how flags are read and checked, and errors as one line with exit status 2."""
from __future__ import annotations

import argparse
import difflib
import logging
import math
import sys
from pathlib import Path
from typing import Callable

from ip_adapter.config import ROOT, InferenceConfig, load_config
from ip_adapter.inputs import MAX_SIZE
from ldm.errors import UserError
from ldm.parallel import leave


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Appends the default where there is one and the help does not explain it itself."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or action.default is False or "(default: " in action.help:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with whole flag names only, defaults in the help, and one-line errors that know the nearest flag."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False, formatter_class=_Help)

    def error(self, message: str):
        """Print one line and leave with status 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (-h lists all flags)\n")

    def parse_args(self, args=None, namespace=None):
        """As argparse, but defaults are checked too, and an unknown flag is answered with the nearest known one.

        Of a parser that has a default for `own_process`, that says whether the flags are those of this process.
        """
        for action in self._actions:
            if action.type and isinstance(action.default, (int, float)):  # a configuration file's, not yet checked
                try:
                    action.type(str(action.default))
                except argparse.ArgumentTypeError as error:
                    self.error(f"default of {action.option_strings[0]} in the configuration file: {error}")
        known, unknown = self.parse_known_args(args, namespace)
        for word in unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(word.split("=")[0], flags, 1, 0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            self.error(f"unknown flag {word}{hint}" if word.startswith("-") else f"unexpected argument {word!r}")
        if "own_process" in known:
            known.own_process = args is None
        return known


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
    """An argparse type: a file that is there."""
    path = Path(text)
    if not path.exists():
        raise argparse.ArgumentTypeError(f"{text}: no such file")
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text}: is a folder, expected a file")
    return path


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
    early = Parser(description="")
    add_config_flags(early, next(iter(versions)), versions, flag)
    args, _ = early.parse_known_args([word for word in (sys.argv[1:] if argv is None else argv)
                                      if word not in ("-h", "--help")])
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
        help="threads that compute on the CPU, 0 for one a core")
    add("--log_level", choices=["debug", "info", "warning", "error"], default="info", help="how much is said")


def first_existing(paths, flag: str, advice: str = "name another") -> Path:
    """The first of `paths` that is a file, here or, for those that ship with the project, in its folder.

    Raises:
        UserError: none is.
    """
    for path in (Path(folder) / path for path in paths for folder in (".", ROOT)):
        if path.is_file():
            return path
    raise UserError(f"{flag}: no file {' or '.join(map(str, paths))}; {advice}")


def start_logging(level: str = "info") -> None:
    """Messages as plain lines on standard error."""
    logging.basicConfig(level=level.upper(), format="%(message)s", stream=sys.stderr, force=True)


def execute(main: Callable[[], None]) -> None:
    """Run a script: the user's mistakes become one line and status 2, Ctrl-C status 130."""
    name = Path(sys.argv[0]).name
    try:
        main()
        leave(0)
    except UserError as error:
        sys.exit(_leave(2, f"{name}: error: {' '.join(str(error).split())}"))
    except KeyboardInterrupt:
        sys.exit(_leave(130, f"{name}: interrupted; finished pictures and files are kept, unfinished ones removed"))


def _leave(status: int, line: str) -> int:
    print(line, file=sys.stderr)
    leave(status)
    return status
