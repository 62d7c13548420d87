"""A reference image changed after the model of another, with Stable Diffusion 1.5 and an IP-Adapter.

python image_to_image_sd.py --img river.png --ref_img vermeer.jpg --strength 0.6
"""
from __future__ import annotations

from typing import TYPE_CHECKING

from ip_adapter.cli.script import run_script

if TYPE_CHECKING:
    from argparse import Namespace

    from ip_adapter.config import InferenceConfig

SCRIPT = "image_to_image_sd.py"


def main(argv: list | None = None) -> None:
    """Parse the flags, then make the images."""
    from ip_adapter.cli.inference import (
        IMAGE_NAMES,
        INFERENCE_SD,
        add_image,
        inference_args,
        inference_config,
        inference_parser,
        start,
    )
    from ip_adapter.cli.parser import in_range
    version, config = inference_config(argv, INFERENCE_SD, SCRIPT)
    parser = inference_parser(__doc__, version, config, other_names=IMAGE_NAMES)
    add_image(parser, "--ref_img", config.ref_img, "the image to change; its size is that of the output")
    parser.add_argument("--strength", type=in_range(float, 0, 1), default=0.6,
                        help="how much is changed: this part of the steps is run; 1 keeps next to nothing")
    args = inference_args(parser, argv, SCRIPT)
    start(args)
    make(args, config)


def make(args: Namespace, config: InferenceConfig) -> None:
    """Build the model and make the images; MindSpore is imported here, once the flags are found good."""
    from ip_adapter.inference.inputs import open_inputs
    from ip_adapter.inference.reference import Reference
    from ip_adapter.inference.run import open_run
    from ldm.sampling.ddim import sample_ddim
    from ldm.sampling.schedule import leading_timesteps
    inputs, timesteps = open_inputs(args), leading_timesteps(args.sampling_steps, args.strength)
    run, model = open_run(args, config, inputs, timesteps)
    schedule = model.diffusion.schedule
    reference = Reference(model, inputs, args, schedule.add_noise)

    def sample(denoise, batch):
        return sample_ddim(denoise, reference.start(batch.noise, timesteps[0], batch.noise), timesteps, schedule)

    run.make(model, inputs, sample)


if __name__ == "__main__":
    run_script(main)
