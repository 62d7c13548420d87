"""A image as a prompt and another for the structure: SDXL with an IP-Adapter and ControlNets.

python controlnet_sdxl.py --img statue.png --control_image depth.png --num_cols 3
"""
from __future__ import annotations

from typing import TYPE_CHECKING

from ip_adapter.cli.script import run_script

if TYPE_CHECKING:
    from argparse import Namespace

    from ip_adapter.config import InferenceConfig

SCRIPT = "controlnet_sdxl.py"


def main(argv: list | None = None) -> None:
    """Parse the flags, then make the images."""
    from ip_adapter.cli.inference import (
        INFERENCE_SDXL,
        add_edm_flags,
        inference_args,
        inference_config,
        inference_parser,
        start,
    )
    from ip_adapter.families import SDXL
    version, config = inference_config(argv, INFERENCE_SDXL, SCRIPT)
    parser = inference_parser(__doc__, version, config, controlled=True, family=SDXL)
    add_edm_flags(parser, config)
    args = inference_args(parser, argv, SCRIPT)
    start(args)
    make(args, config)


def make(args: Namespace, config: InferenceConfig) -> None:
    """Build the model and make the images; MindSpore is imported here, once the flags are found good."""
    from gm.choices import guidance
    from gm.denoiser import starting_noise, timesteps_of
    from gm.discretizer import discretize
    from gm.sampler import SAMPLERS
    from ip_adapter.inference.inputs import open_inputs
    from ip_adapter.inference.run import open_run
    inputs, args.scale = open_inputs(args), guidance(args.guider, args.scale)
    schedule = config.model.schedule()
    sigmas = discretize(args.discretization, args.sampling_steps, schedule=schedule)
    run, model = open_run(args, config, inputs, timesteps_of(sigmas[:-1], schedule))

    def sample(denoise, batch):
        return SAMPLERS[args.sampler](denoise, starting_noise(batch.noise, sigmas[0]), sigmas, batch.fresh_noise)

    run.make(model, inputs, sample)


if __name__ == "__main__":
    run_script(main)
