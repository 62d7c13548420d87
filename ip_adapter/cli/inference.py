"""Command lines of the inference scripts: the flags they share, and start-up."""
from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Callable

from gm.choices import DISCRETIZATIONS, GUIDERS, SAMPLERS
from ip_adapter.cli.parser import (
    Parser,
    add_config_flags,
    add_device_flags,
    boolean,
    checkpoint_file,
    config_from,
    existing_file,
    in_range,
    number_of,
    one_of,
    output_folder,
    prompt,
    start_logging,
)
from ip_adapter.config import ROOT, InferenceConfig, SamplingConfig
from ip_adapter.families import SD15, SDXL, Family
from ip_adapter.inference.metadata import with_png
from ldm.errors import UserError

# Configuration files by --version.
INFERENCE_SD = {"1.5": "inference/sd_v15.yaml", "demo": "inference/sd_demo.yaml"}
INFERENCE_SDXL = {"xl": "inference/sd_xl_base.yaml", "demo": "inference/sd_xl_demo.yaml"}
# Those of a family; and, for what is made with either family, the demo models' and all.
INFERENCE = {SD15.name: INFERENCE_SD, SDXL.name: INFERENCE_SDXL}
DEMOS = {"demo": INFERENCE_SD["demo"], "xl_demo": INFERENCE_SDXL["demo"]}
EITHER = {"1.5": INFERENCE_SD["1.5"], "xl": INFERENCE_SDXL["xl"], **DEMOS}


# What diffusers, ComfyUI and A1111 call the flags that all inference scripts share.
OTHER_NAMES = {
    "--steps": "--sampling_steps", "--num_inference_steps": "--sampling_steps", "--height": "--H", "--width": "--W",
    "--cfg_scale": "--scale", "--ip_adapter_scale": "--ip_scale", "--ip_adapter_image": "--img",
    "--batch_size": "--n_samples", "--num_images_per_prompt": "--n_samples", "--outdir": "--output_path",
    "--output_dir": "--output_path", "--model": "--ckpt_path", "--checkpoint": "--ckpt_path", "--precision": "--dtype",
}
# Those of scripts whose output is made from a reference, and of all others.
IMAGE_NAMES = {"--image": "--ref_img", "--init_image": "--ref_img"}
REFERENCE_NAMES = {**IMAGE_NAMES, "--mask": "--ref_mask", "--mask_image": "--ref_mask"}
PROMPT_NAMES = {"--image": "--img"}


def add_image(parser: argparse.ArgumentParser, flag: str, default: str, text: str) -> None:
    """A flag that names an image, required unless the configuration has one."""
    parser.add_argument(flag, type=existing_file, required=not default, help=text,
                        default=str(ROOT / default) if default else None)


def inference_parser(description: str, version: str, config: InferenceConfig, controlled: bool = False,
                     family: Family = SD15, other_names: dict = PROMPT_NAMES) -> Parser:
    """The flags all inference scripts share, with their defaults from `config`; scripts add their own.

    Args:
        description: what the script does.
        version: the name of the model.
        config: the defaults.
        controlled: whether a ControlNet is what the script is for, not an addition.
        family: of the model.
        other_names: names of flags in other tools, beside those all scripts share.
    """
    s, parser = config.sampling, Parser(description, {**OTHER_NAMES, **other_names})
    parser.set_defaults(family=family, default_samples=s.n_samples, default_size=(s.W, s.H),
                        default_control_scale=s.control_scale, own_process=False)
    group = parser.add_argument_group("input")
    add = group.add_argument
    add_image(group, "--img", config.img, "the image that serves as a prompt")
    add("--prompt", type=prompt, default=s.prompt, help="what the image should show")
    add("--negative_prompt", type=prompt, default=s.negative_prompt, help="what it should not show")
    add("--data_path", type=existing_file, help="text file with one prompt a line, instead of --prompt")
    add("--negative_data_path", type=existing_file,
        help="text file with one negative prompt, or one for each prompt; a blank line stands for none")
    add("--from_png", metavar="FILE", help="take all flags that made this image; flags given as well count instead")
    add_sampling_flags(parser.add_argument_group("sampling").add_argument, config)
    add = parser.add_argument_group("adapter").add_argument
    add("--ip_scale", type=number_of(SamplingConfig, "ip_scale"), default=s.ip_scale,
        help="weight of the image prompt; 0 is plain text-to-image")
    add("--ip_adapter", "--ip_adpater", type=checkpoint_file,
        help="adapter to use instead of the checkpoint's: published, or finetuned by the training script")
    group = parser.add_argument_group("model")
    add_config_flags(group, version, INFERENCE[family.name])
    group.add_argument("--ckpt_path", "--weight", type=checkpoint_file,
                       help=f"merged checkpoint (default: {' or '.join(config.ckpt_path)}, or one merged beside it)")
    group.add_argument("--vae", type=checkpoint_file, help="autoencoder to use instead of the checkpoint's")
    add = parser.add_argument_group("output").add_argument
    add("--output_path", "--save_path", type=output_folder, default=config.output_path, help="output folder")
    add("--skip_save", action="store_true", help="do not write the single images")
    add("--skip_grid", action="store_true", help="do not write the grid")
    group = parser.add_argument_group("device")
    add_device_flags(group, "0 on Ascend; on the CPU 1, but for denoiser and decoder where compiling them "
                     "takes less time than it saves")
    group.add_argument("--graph_cache", type=graph_folder, metavar="FOLDER",
                       help="where compiled graphs are kept for later runs like this one, or none (default: on the CPU "
                            "~/.cache/ip_adapter, on Ascend none)")
    add_shortcut_flags(parser)
    add_control_flags(parser, config, controlled)
    return parser


def add_sampling_flags(add: Callable, config: InferenceConfig) -> None:
    """The flags of what is made, and how."""
    s = config.sampling
    add("--scale", "--guidance_scale", type=number_of(SamplingConfig, "scale"), default=s.scale,
        help="classifier-free guidance; 1 or less leaves the unconditional branch out")
    add("--seed", type=number_of(SamplingConfig, "seed"), default=s.seed, help="image n is made from seed + n")
    add("--sampling_steps", "--sample_step", type=number_of(SamplingConfig, "sampling_steps"),
        default=s.sampling_steps, help="denoising steps")
    size = "in pixels, a multiple of 8 (default: that of --ref_img; or"
    add("--H", type=number_of(SamplingConfig, "H"), help=f"height {size} {s.H}, with a hint in its proportions)")
    add("--W", type=number_of(SamplingConfig, "W"), help=f"width {size} {s.W}, with a hint in its proportions)")
    add("--n_samples", "--num_cols", "--ncols", type=number_of(SamplingConfig, "n_samples"),
        help=f"images made together in one trial (default: {s.n_samples}, or as many as --latents holds)")
    add("--n_iter", "--num_trials", type=number_of(SamplingConfig, "n_iter"), default=s.n_iter,
        help="trials for each prompt")
    add("--latents", type=existing_file, help=".npy with the starting noise (n, 4, H/8, W/8) float32 of unit "
                                              "variance, instead of the seeded one")


def graph_folder(text: str) -> Path:
    """An argparse type: a folder for compiled graphs, or the word none."""
    return Path(text) if text == "none" else output_folder(text)


def add_shortcut_flags(parser: Parser) -> None:
    """The flags that trade exactness for time."""
    add = parser.add_argument_group("shortcuts", "Faster, and a slightly different image.").add_argument
    add("--guidance_start", type=in_range(float, 0, 1),
        help="fraction of the steps before guidance begins; without it a step is half the work (default: 0)")
    add("--guidance_end", type=in_range(float, 0, 1), help="fraction of the steps after which it ends (default: 1)")
    add("--deep_every", type=in_range(int, 1, 1000),
        help="make the UNet's deep features at every Nth step only, and keep them in between (default: 1)")


def add_edm_flags(parser: Parser, config: InferenceConfig) -> None:
    """The flags of SDXL's samplers, and of the sizes it is told."""
    add, s = parser.add_argument_group("SDXL").add_argument, config.sampling
    add("--sampler", type=sampler, default=s.sampler,
        help=f"one of {', '.join(f'{name} ({short})' for name, short in SAMPLERS.items())}")
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


def sampler(text: str) -> str:
    """An argparse type: a sampler by its name in the original code or in other tools."""
    known = {**{name: name for name in SAMPLERS}, **{short: name for name, short in SAMPLERS.items()}}
    return known[one_of(*known)(text)]


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
    add = parser.add_argument_group("ControlNet", "Flags may be repeated, once for each hint.").add_argument
    add("--control_image", "--control_img", type=existing_file, action="append", required=required and not default,
        help="hint: the image a ControlNet follows" + (f" (default: {default})" if default else ""))
    add("--controlnet", type=checkpoint_file, action="append", default=[],
        help="file of the hint's ControlNet, diffusers' or original layout (default: the checkpoint's own; it is "
             "the first hint's if there is one hint more than files)")
    add("--control_scale", type=number_of(SamplingConfig, "control_scale"), action="append", default=[],
        help=f"how strongly the hint is followed (default: {config.sampling.control_scale})")
    add("--control_start", type=in_range(float, 0, 1), action="append", default=[],
        help="fraction of the steps before the ControlNet acts (default: 0)")
    add("--control_end", type=in_range(float, 0, 1), action="append", default=[],
        help="fraction of the steps after which it no longer acts (default: 1)")
    add("--canny", type=in_range(int, 0, 10000), nargs=2, metavar=("LOW", "HIGH"), action="append", default=[],
        help="make the hint from the edges of the image, between these thresholds, such as 100 200 "
             "(default: 0 0, the image is the hint)")
    parser.set_defaults(default_hints=[Path(ROOT / default)] if default else [])


def inference_config(argv: list | None, versions: dict, script: str) -> tuple:
    """As `config_from`, of an inference script; `--from_png` may name the version."""
    return config_from(with_png(_words(argv), script), versions)


def inference_args(parser: Parser, argv: list | None, script: str) -> argparse.Namespace:
    """Parse the flags of an inference script, those of the image that --from_png names included.

    Args:
        parser: of the script.
        argv: the words of the command line, None for those of this process.
        script: its name.
    """
    args = parser.parse_args(with_png(parser.own_names(_words(argv)), script))
    args.own_process, args.script = argv is None, script
    args.given = [action for action in parser._actions if action.dest in parser.given]
    return args


def _words(argv: list | None) -> list:
    return sys.argv[1:] if argv is None else [str(word) for word in argv]


def start(args: argparse.Namespace) -> None:
    """Set up logging, device and mode of an inference; fills in `dtype` and `control_image` where no flag did.

    Raises:
        UserError: flags do not fit together.
    """
    start_logging(args.log_level)
    check_fit(args)
    from ldm.device import default_dtype, start_device  # MindSpore is imported once the flags are found good
    logging.getLogger(__name__).info("starting MindSpore")
    start_device(args.device_target, args.ms_mode, args.cpu_threads)
    args.dtype = args.dtype or default_dtype()
    args.control_image = args.control_image or args.default_hints  # argparse would append to a default


def check_fit(args: argparse.Namespace) -> None:
    """Check the flags that depend on each other.

    Raises:
        UserError: two of them do not fit together.
    """
    if getattr(args, "mask_blur", 0) and not args.paste_original:
        raise UserError("--mask_blur softens the edge of the kept pixels, so it needs --paste_original True")
    start, end = args.guidance_start or 0.0, 1.0 if args.guidance_end is None else args.guidance_end
    if start >= end and (args.guidance_start is not None or end > 0):
        raise UserError(f"--guidance_start {start} is not before --guidance_end {end}; no step would be guided: "
                        "for that give --scale 1")
