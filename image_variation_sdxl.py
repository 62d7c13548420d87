"""Variations of an image with SDXL and an IP-Adapter; with a reference, that is changed or in part repainted.

python image_variation_sdxl.py --img photo.jpg --prompt "wearing a hat" --ip_scale 0.6 --num_cols 4
python image_variation_sdxl.py --img river.png --ref_img vermeer.jpg --strength 0.6
"""
from __future__ import annotations

from typing import TYPE_CHECKING

from ip_adapter.cli.script import run_script
from ldm.errors import UserError

if TYPE_CHECKING:
    from argparse import Namespace

    from ip_adapter.config import InferenceConfig

SCRIPT = "image_variation_sdxl.py"


def main(argv: list | None = None) -> None:
    """Parse the flags, then make the images."""
    from ip_adapter.cli.inference import (
        INFERENCE_SDXL,
        PROMPT_NAMES,
        REFERENCE_NAMES,
        add_edm_flags,
        add_mask_flags,
        inference_args,
        inference_config,
        inference_parser,
        start,
    )
    from ip_adapter.cli.parser import existing_file, in_range
    from ip_adapter.families import SDXL
    version, config = inference_config(argv, INFERENCE_SDXL, SCRIPT)
    parser = inference_parser(__doc__, version, config, family=SDXL, other_names={**REFERENCE_NAMES, **PROMPT_NAMES})
    add_edm_flags(parser, config)
    add = parser.add_argument_group("reference").add_argument
    add("--ref_img", type=existing_file, help="an image to change; its size is that of the output")
    add("--ref_mask", type=existing_file, help="what of it to repaint: white; black is kept")
    add("--strength", type=in_range(float, 0, 1),
        help="how much of it is changed: this part of the steps is run (default: 0.6, with --ref_mask 0.7)")
    add_mask_flags(parser)
    args = inference_args(parser, argv, SCRIPT)
    if args.ref_img is None and (args.ref_mask or args.strength is not None):
        raise UserError(f"{'--ref_mask' if args.ref_mask else '--strength'} has nothing to act on; give --ref_img FILE")
    if args.ref_img and args.strength is None:
        args.strength = 0.7 if args.ref_mask else 0.6
    start(args)
    make(args, config)


def make(args: Namespace, config: InferenceConfig) -> None:
    """Build the model and make the images; MindSpore is imported here, once the flags are found good."""
    from gm.choices import guidance
    from gm.denoiser import add_noise, starting_noise, timesteps_of
    from gm.discretizer import discretize
    from gm.sampler import SAMPLERS
    from ip_adapter.inference.inputs import open_inputs
    from ip_adapter.inference.reference import Reference
    from ip_adapter.inference.run import open_run
    inputs, args.scale = open_inputs(args), guidance(args.guider, args.scale)
    strength, schedule = 1.0 if args.ref_img is None else args.strength, config.model.schedule()
    sigmas = discretize(args.discretization, args.sampling_steps, strength, schedule)
    run, model = open_run(args, config, inputs, timesteps_of(sigmas[:-1], schedule))
    reference = Reference(model, inputs, args, add_noise)

    def sample(denoise, batch):
        x = reference.start(batch.noise, sigmas[0], starting_noise(batch.noise, sigmas[0]))
        return SAMPLERS[args.sampler](denoise, x, sigmas, batch.fresh_noise, reference.keep(batch.noise))

    run.make(model, inputs, sample, reference.finish)


if __name__ == "__main__":
    run_script(main)
