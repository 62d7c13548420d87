"""Variations of a picture with Stable Diffusion 1.5 and an IP-Adapter.

python image_variation_sd.py --img photo.jpg --prompt "wearing a hat" --ip_scale 0.6
"""
from __future__ import annotations

from ip_adapter.build import build_sd
from ip_adapter.cli import config_from, default_weights, execute, existing_file, inference_parser, start
from ip_adapter.config import ROOT
from ip_adapter.preprocess import open_image
from ip_adapter.run import Run
from ldm.ddim import sample_ddim
from ldm.schedule import NoiseSchedule


def main(argv: list | None = None) -> None:
    """Parse the flags, build the model, make the pictures."""
    version, config = config_from(argv)
    parser = inference_parser(__doc__, version, config)
    parser.add_argument("--img", type=existing_file, required=not config.img,
                        default=ROOT / config.img if config.img else None, help="the picture to vary")
    args = parser.parse_args(argv)
    start(args)

    image = open_image(args.img)
    weights = default_weights(args, config)
    run = Run(args, config.name, weights)
    model = build_sd(weights, config.model, args.dtype)
    model.set_ip_scale(args.ip_scale)
    schedule = NoiseSchedule(config.model.beta_start, config.model.beta_end)

    image_tokens = model.image_tokens(image)
    for batch in run.batches():
        cond, uncond = model.condition(batch.prompts, batch.negative_prompts, image_tokens)
        denoise = model.diffusion.denoiser(cond, uncond, args.scale)
        latents = run.sample(sample_ddim(denoise, batch.noise, args.sampling_steps, schedule), args.sampling_steps)
        run.save(model.diffusion.decode(latents), batch, [image])
    run.report()


if __name__ == "__main__":
    execute(main)
