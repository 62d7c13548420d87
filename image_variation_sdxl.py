"""Variations of a picture with SDXL and an IP-Adapter; with a reference, that is changed or in part repainted.

python image_variation_sdxl.py --img photo.jpg --prompt "wearing a hat" --ip_scale 0.6 --num_cols 4
python image_variation_sdxl.py --img river.png --ref_img vermeer.jpg --strength 0.6
"""
from __future__ import annotations

from gm.choices import guidance
from gm.denoiser import add_noise, starting_noise, timesteps_of
from gm.discretizer import discretize
from gm.sampler import SAMPLERS
from ip_adapter.cli import config_from, execute, existing_file, in_range
from ip_adapter.families import SDXL
from ip_adapter.inference_cli import INFERENCE_SDXL, add_edm_flags, add_mask_flags, inference_parser, start
from ip_adapter.inputs import open_inputs
from ip_adapter.reference import Reference
from ip_adapter.run import open_run
from ldm.errors import UserError


def main(argv: list | None = None) -> None:
    """Parse the flags, build the model, make the pictures."""
    version, config = config_from(argv, INFERENCE_SDXL)
    parser = inference_parser(__doc__, version, config, family=SDXL)
    add_edm_flags(parser, config)
    parser.add_argument("--ref_img", type=existing_file, help="a picture to change; its size is that of the output")
    parser.add_argument("--ref_mask", type=existing_file, help="what of it to repaint: white; black is kept")
    parser.add_argument("--strength", type=in_range(float, 0, 1),
                        help="how much of it is changed: this part of the steps is run (default: 0.6, with --ref_mask "
                             "0.7)")
    add_mask_flags(parser)
    args = parser.parse_args(argv)
    start(args)
    if args.ref_img is None and (args.ref_mask or args.strength is not None):
        raise UserError(f"{'--ref_mask' if args.ref_mask else '--strength'} has nothing to act on; give --ref_img FILE")
    if args.ref_img and args.strength is None:
        args.strength = 0.7 if args.ref_mask else 0.6

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
    execute(main)
