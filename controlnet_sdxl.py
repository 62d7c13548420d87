"""A picture as a prompt and another for the structure: SDXL with an IP-Adapter and ControlNets.

python controlnet_sdxl.py --img statue.png --control_image depth.png --num_cols 3
"""
from __future__ import annotations

from gm.choices import guidance
from gm.denoiser import starting_noise, timesteps_of
from gm.discretizer import discretize
from gm.sampler import SAMPLERS
from ip_adapter.cli import config_from, execute
from ip_adapter.families import SDXL
from ip_adapter.inference_cli import INFERENCE_SDXL, add_edm_flags, inference_parser, start
from ip_adapter.inputs import open_inputs
from ip_adapter.run import open_run


def main(argv: list | None = None) -> None:
    """Parse the flags, build the model, make the pictures."""
    version, config = config_from(argv, INFERENCE_SDXL)
    parser = inference_parser(__doc__, version, config, controlled=True, family=SDXL)
    add_edm_flags(parser, config)
    args = parser.parse_args(argv)
    start(args)

    inputs, args.scale = open_inputs(args), guidance(args.guider, args.scale)
    schedule = config.model.schedule()
    sigmas = discretize(args.discretization, args.sampling_steps, schedule=schedule)
    run, model = open_run(args, config, inputs, timesteps_of(sigmas[:-1], schedule))

    def sample(denoise, batch):
        return SAMPLERS[args.sampler](denoise, starting_noise(batch.noise, sigmas[0]), sigmas, batch.fresh_noise)

    run.make(model, inputs, sample)


if __name__ == "__main__":
    execute(main)
