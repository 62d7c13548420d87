"""Command lines of the inference scripts: the flags they share, and start-up."""
from __future__ import annotations

import argparse
from pathlib import Path

from gm.choices import DISCRETIZATIONS, GUIDERS, SAMPLERS
from ip_adapter.build import ExtraParts
from ip_adapter.cli import (
    Parser,
    add_config_flags,
    add_device_flags,
    boolean,
    existing_file,
    first_existing,
    in_range,
    multiple_of_8,
    one_of,
    start_logging,
)
from ip_adapter.config import ROOT, InferenceConfig
from ip_adapter.families import SD15, SDXL, Family
from ldm.device import default_dtype, start_device
from ldm.errors import UserError

# Configuration files by --version.
INFERENCE_SD = {"1.5": "inference/sd_v15.yaml", "demo": "inference/sd_demo.yaml"}
INFERENCE_SDXL = {"xl": "inference/sd_xl_base.yaml", "demo": "inference/sd_xl_demo.yaml"}
# Those of a family; and, for what is made with either family, the demo models' and all.
INFERENCE = {SD15.name: INFERENCE_SD, SDXL.name: INFERENCE_SDXL}
DEMOS = {"demo": INFERENCE_SD["demo"], "xl_demo": INFERENCE_SDXL["demo"]}
EITHER = {"1.5": INFERENCE_SD["1.5"], "xl": INFERENCE_SDXL["xl"], **DEMOS}


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
    add_device_flags(parser, "0 on Ascend; on the CPU 1, but for denoiser and decoder where compiling them "
                     "takes less time than it saves")
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


def start(args: argparse.Namespace) -> None:
    """Set up logging, device and mode of an inference; fills in `dtype` and `control_image` where no flag did."""
    start_logging(args.log_level)
    start_device(args.device_target, args.ms_mode, args.cpu_threads)
    args.dtype = args.dtype or default_dtype()
    args.control_image = args.control_image or args.default_hints  # argparse would append to a default
    if getattr(args, "mask_blur", 0) and not args.paste_original:
        raise UserError("--mask_blur softens the edge of the kept pixels, so it needs --paste_original True")
