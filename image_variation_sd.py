"""Variations of an image with Stable Diffusion 1.5 and an IP-Adapter.

python image_variation_sd.py --img photo.jpg --prompt "wearing a hat" --ip_scale 0.6
"""
from __future__ import annotations

from typing import TYPE_CHECKING

from ip_adapter.cli.script import run_script

if TYPE_CHECKING:
    from argparse import Namespace

    from ip_adapter.config import InferenceConfig

SCRIPT = "image_variation_sd.py"


def main(argv: list | None = None) -> None:
    """Parse the flags, then make the images."""
    from ip_adapter.cli.inference import INFERENCE_SD, inference_args, inference_config, inference_parser, start
    version, config = inference_config(argv, INFERENCE_SD, SCRIPT)
    args = inference_args(inference_parser(__doc__, version, config), argv, SCRIPT)
    start(args)
    make(args, config)


def make(args: Namespace, config: InferenceConfig) -> None:
    """Build the model and make the images; MindSpore is imported here, once the flags are found good."""
    from ip_adapter.inference.inputs import open_inputs
    from ip_adapter.inference.run import open_run
    from ldm.sampling.ddim import sample_ddim
    from ldm.sampling.schedule import leading_timesteps
    inputs, timesteps = open_inputs(args), leading_timesteps(args.sampling_steps)
    run, model = open_run(args, config, inputs, timesteps)
    schedule = model.diffusion.schedule
    run.make(model, inputs, lambda denoise, batch: sample_ddim(denoise, batch.noise, timesteps, schedule))


if __name__ == "__main__":
    run_script(main)
