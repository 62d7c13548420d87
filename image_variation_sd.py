"""Variations of a picture with Stable Diffusion 1.5 and an IP-Adapter.

python image_variation_sd.py --img photo.jpg --prompt "wearing a hat" --ip_scale 0.6
"""
from __future__ import annotations

from ip_adapter.cli import config_from, execute
from ip_adapter.inference_cli import INFERENCE_SD, inference_parser, start
from ip_adapter.inputs import open_inputs
from ip_adapter.run import open_run
from ldm.ddim import sample_ddim
from ldm.schedule import leading_timesteps


def main(argv: list | None = None) -> None:
    """Parse the flags, build the model, make the pictures."""
    version, config = config_from(argv, INFERENCE_SD)
    args = inference_parser(__doc__, version, config).parse_args(argv)
    start(args)

    inputs, timesteps = open_inputs(args), leading_timesteps(args.sampling_steps)
    run, model = open_run(args, config, inputs, timesteps)
    schedule = model.diffusion.schedule
    run.make(model, inputs, lambda denoise, batch: sample_ddim(denoise, batch.noise, timesteps, schedule))


if __name__ == "__main__":
    execute(main)
