"""Command lines: the flags inference scripts share, start-up, and errors as one line with exit status 2."""
from __future__ import annotations

import argparse
import difflib
import logging
import math
import sys
from pathlib import Path
from typing import Callable

from gm.discretizer import DISCRETIZATIONS
from gm.guider import GUIDERS
from gm.sampler import SAMPLERS
from ip_adapter.build import ExtraParts
from ip_adapter.config import ROOT, InferenceConfig, load_config
from ip_adapter.families import SD15, SDXL, Family
from ip_adapter.inputs import MAX_SIZE
from ldm.device import default_dtype, start_device
from ldm.errors import UserError
from ldm.parallel import leave

# Configuration files by --version.
INFERENCE_SD = {"1.5": "inference/sd_v15.yaml", "demo": "inference/sd_demo.yaml"}
INFERENCE_SDXL = {"xl": "inference/sd_xl_base.yaml", "demo": "inference/sd_xl_demo.yaml"}
# Those of a family; and, for what is made with either family, the demo models' and all.
INFERENCE = {SD15.name: INFERENCE_SD, SDXL.name: INFERENCE_SDXL}
DEMOS = {"demo": INFERENCE_SD["demo"], "xl_demo": INFERENCE_SDXL["demo"]}
EITHER = {"1.5": INFERENCE_SD["1.5"], "xl": INFERENCE_SDXL["xl"], **DEMOS}


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


def config_from(argv: list | None, schema: type = InferenceConfig, versions: dict = INFERENCE_SD,
                flag: str = "--version") -> tuple:
    """The configuration that `--version` and `--config` name, before the other flags take their defaults from it.

    Args:
        argv: the words of the command line, None for those of this process.
        schema: dataclass of the configuration.
        versions: file below configs/ for each name of a version; the first is the default.
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


def add_picture(parser: argparse.ArgumentParser, flag: str, default: str, text: str) -> None:
    """A flag that names a picture, required unless the configuration has one."""
    parser.add_argument(flag, type=existing_file, required=not default, help=text,
                        default=ROOT / default if default else None)


def inference_parser(description: str, version: str, config: InferenceConfig, controlled: bool = False,
                     family: Family = SD15) -> Parser:
    """The flags all inference scripts share, with their defaults from `config`; scripts add their own.

    Args:
        description: what the script does.
        version: the name of the model.
        config: the defaults.
        controlled: whether a ControlNet is what the script is for, not an addition.
        family: of the model.
    """
    s, parser = config.sampling, Parser(description)
    parser.set_defaults(family=family, default_samples=s.n_samples, default_size=(s.W, s.H),
                        default_control_scale=s.control_scale, own_process=False)
    add = parser.add_argument
    add_picture(parser, "--img", config.img, "the picture that serves as a prompt")
    add("--prompt", default=s.prompt, help="what the picture should show")
    add("--negative_prompt", default=s.negative_prompt, help="what it should not show")
    add("--data_path", type=existing_file, help="text file with one prompt a line, instead of --prompt")
    add("--negative_data_path", type=existing_file, help="text file with one negative prompt, or one for each prompt")
    add("--ip_scale", type=in_range(float, 0, 10), default=s.ip_scale,
        help="weight of the picture prompt; 0 is plain text-to-image")
    add("--scale", "--guidance_scale", type=in_range(float, 0, 100), default=s.scale,
        help="classifier-free guidance; 1 or less leaves the negative side out")
    add("--seed", type=in_range(int, 0, 2**63), default=s.seed, help="picture n is made from seed + n")
    add("--sampling_steps", "--sample_step", type=in_range(int, 1, 1000), default=s.sampling_steps,
        help="denoising steps")
    size = "in pixels, a multiple of 8 (default: that of --ref_img; or"
    add("--H", type=multiple_of_8, help=f"height {size} {s.H}, with a hint in its proportions)")
    add("--W", type=multiple_of_8, help=f"width {size} {s.W}, with a hint in its proportions)")
    add("--n_samples", "--num_cols", "--ncols", type=in_range(int, 1, 1000),
        help=f"pictures made together in one trial (default: {s.n_samples}, or as many as --latents holds)")
    add("--n_iter", "--num_trials", type=in_range(int, 1, 100000), default=s.n_iter, help="trials for each prompt")
    add("--latents", type=existing_file, help=".npy with the starting noise (n, 4, H/8, W/8) float32 of unit "
                                              "variance, instead of the seeded one")
    add_config_flags(parser, version, INFERENCE[family.name])
    add("--ckpt_path", "--weight", type=existing_file,
        help=f"merged checkpoint (default: {' or '.join(config.ckpt_path)})")
    add("--ip_adapter", "--ip_adpater", type=existing_file,
        help="adapter to use instead of the checkpoint's: published, or finetuned by the training script")
    add("--vae", type=existing_file, help="autoencoder to use instead of the checkpoint's")
    add_device_flags(parser, "0 on Ascend; on the CPU 1, but for SD-1.5's denoiser and "
                     "decoder where compiling them takes less time than it saves")
    add("--graph_cache", type=Path, metavar="FOLDER", help="where compiled graphs are kept for later runs like this "
        "one, or none (default: on the CPU ~/.cache/ip_adapter, on Ascend none)")
    add("--output_path", "--save_path", type=Path, default=Path(config.output_path), help="output folder")
    add("--skip_save", action="store_true", help="do not write the single pictures")
    add("--skip_grid", action="store_true", help="do not write the grid")
    add_shortcut_flags(parser)
    add_control_flags(parser, config, controlled)
    return parser


def add_shortcut_flags(parser: Parser) -> None:
    """The flags that trade exactness for time."""
    add = parser.add_argument_group("Shortcuts", "Faster, and a slightly different picture.").add_argument
    add("--guidance_start", type=in_range(float, 0, 1),
        help="fraction of the steps before guidance begins; without it a step is half the work (default: 0)")
    add("--guidance_end", type=in_range(float, 0, 1), help="fraction of the steps after which it ends (default: 1)")
    add("--deep_every", type=in_range(int, 1, 1000),
        help="make the UNet's deep features at every Nth step only, and keep them in between (default: 1)")


def add_edm_flags(parser: Parser, config: InferenceConfig) -> None:
    """The flags of SDXL's samplers, and of the sizes it is told."""
    add, s = parser.add_argument, config.sampling
    add("--sampler", type=one_of(*SAMPLERS), default=s.sampler, help=f"one of {', '.join(SAMPLERS)}")
    add("--discretization", type=one_of(*DISCRETIZATIONS), default=s.discretization,
        help=f"the noise levels, one of {', '.join(DISCRETIZATIONS)}")
    add("--guider", type=one_of(*GUIDERS), default=s.guider,
        help="VanillaCFG, or IdentityGuider for no guidance at all")
    for side in ("height", "width"):
        for what in ("orig", "target"):
            add(f"--{what}_{side}", type=in_range(int, 1, 65536),
                help=f"the {'original' if what == 'orig' else what} {side} SDXL is told (default: that of the output)")
    for side in ("top", "left"):
        add(f"--crop_coords_{side}", type=in_range(int, 0, 65536), default=0,
            help=f"pixels cropped away at the {side} that SDXL is told of")


def add_mask_flags(parser: Parser) -> None:
    """The flags of a mask of what is repainted."""
    parser.add_argument("--invert_mask", type=boolean, nargs="?", const=True, default=False,
                        help="repaint what is black, keep what is white")
    parser.add_argument("--paste_original", type=boolean, nargs="?", const=True, default=True,
                        help="put the kept pixels back from the reference; False leaves them as the autoencoder "
                             "gives them back")
    parser.add_argument("--mask_blur", type=in_range(float, 0, 256), default=0.0,
                        help="width in pixels of a soft edge within the repainted part; needs --paste_original")


def add_control_flags(parser: Parser, config: InferenceConfig, required: bool) -> None:
    """The flags of ControlNets. Each may be repeated, once for every hint; given once, it holds for all."""
    default = config.control_image if required else ""
    add = parser.add_argument_group("ControlNet", "Flags may be repeated, one for each hint.").add_argument
    add("--control_image", "--control_img", type=existing_file, action="append", required=required and not default,
        help="hint: the picture a ControlNet follows" + (f" (default: {default})" if default else ""))
    add("--controlnet", type=existing_file, action="append", default=[],
        help="file of the hint's ControlNet, diffusers' or original layout (default: the checkpoint's own; it is "
             "the first hint's if there is one hint more than files)")
    add("--control_scale", type=in_range(float, 0, 10), action="append", default=[],
        help=f"how strongly the hint is followed (default: {config.sampling.control_scale})")
    add("--control_start", type=in_range(float, 0, 1), action="append", default=[],
        help="fraction of the steps before the ControlNet acts (default: 0)")
    add("--control_end", type=in_range(float, 0, 1), action="append", default=[],
        help="fraction of the steps after which it no longer acts (default: 1)")
    add("--canny", type=in_range(int, 0, 10000), nargs=2, metavar=("LOW", "HIGH"), action="append", default=[],
        help="make the hint from the edges of the picture, between these thresholds, such as 100 200 "
             "(default: 0 0, the picture is the hint)")
    parser.set_defaults(default_hints=[ROOT / default] if default else [])


def extra_parts(args: argparse.Namespace) -> ExtraParts:
    """The files that stand in for parts of the checkpoint, a ControlNet for each hint.

    Raises:
        UserError: hints and ControlNets are not equally many.
    """
    hints, files = len(args.control_image), len(args.controlnet)
    if files > hints:
        raise UserError(f"--controlnet is given {files} times, --control_image {hints} times; "
                        "every ControlNet needs a hint")
    if hints - files > 1:
        raise UserError(f"--control_image is given {hints} times, --controlnet {files} times; the checkpoint's own "
                        "ControlNet serves one hint only, give --controlnet for the others")
    return ExtraParts(args.ip_adapter, args.vae, [None] * (hints - files) + args.controlnet)


def default_weights(args: argparse.Namespace, config: InferenceConfig, family: Family = SD15) -> Path:
    """The checkpoint to load: the flag's, else the first default that exists.

    Raises:
        UserError: neither flag nor file.
    """
    if args.ckpt_path:
        return args.ckpt_path
    return first_existing(config.ckpt_path, "--ckpt_path",
                          f"make it with {family.tool} or try --version demo")


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


def start(args: argparse.Namespace) -> None:
    """Set up logging, device and mode of an inference; fills in `dtype` and `control_image` where no flag did."""
    start_logging(args.log_level)
    start_device(args.device_target, args.ms_mode, args.cpu_threads)
    args.dtype = args.dtype or default_dtype()
    args.control_image = args.control_image or args.default_hints  # argparse would append to a default
    if getattr(args, "mask_blur", 0) and not args.paste_original:
        raise UserError("--mask_blur softens the edge of the kept pixels, so it needs --paste_original True")


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
