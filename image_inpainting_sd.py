"""A part of a picture repainted after the model of another, with Stable Diffusion 1.5 and an IP-Adapter.

python image_inpainting_sd.py --img girl.png --ref_img image.png --ref_mask mask.png
"""
from __future__ import annotations

import numpy as np

from ip_adapter.cli import add_picture, boolean, config_from, execute, in_range, inference_parser, start
from ip_adapter.inputs import open_inputs
from ip_adapter.preprocess import latent_mask, latent_pixels, paste
from ip_adapter.run import open_run
from ldm.ddim import KeptRegion, sample_ddim
from ldm.errors import UserError
from ldm.schedule import leading_timesteps


def main(argv: list | None = None) -> None:
    """Parse the flags, build the model, make the pictures."""
    version, config = config_from(argv)
    parser = inference_parser(__doc__, version, config)
    add_picture(parser, "--ref_img", config.ref_img, "the picture to repaint; its size is that of the output")
    add_picture(parser, "--ref_mask", config.ref_mask, "what to repaint: white; black is kept")
    parser.add_argument("--strength", type=in_range(float, 0, 1), default=0.7,
                        help="how much is changed: this part of the steps is run; 1 starts from noise alone")
    parser.add_argument("--invert_mask", type=boolean, nargs="?", const=True, default=False,
                        help="repaint what is black, keep what is white")
    parser.add_argument("--paste_original", type=boolean, nargs="?", const=True, default=True,
                        help="put the kept pixels back from the reference; False leaves them as the autoencoder "
                             "gives them back")
    parser.add_argument("--mask_blur", type=in_range(float, 0, 256), default=0.0,
                        help="width in pixels of a soft edge within the repainted part; needs --paste_original")
    args = parser.parse_args(argv)
    start(args)
    if args.mask_blur and not args.paste_original:
        raise UserError("--mask_blur softens the edge of the kept pixels, so it needs --paste_original True")

    inputs, timesteps = open_inputs(args), leading_timesteps(args.sampling_steps, args.strength)
    run, model = open_run(args, config)
    schedule, clean = model.diffusion.schedule, model.diffusion.encode_image(latent_pixels(inputs.reference))

    def sample(denoise, noise):
        x = noise if args.strength == 1 else schedule.add_noise(clean, noise, timesteps[0])
        keep = KeptRegion(clean, noise, latent_mask(inputs.mask), schedule.add_noise)
        return sample_ddim(denoise, x, timesteps, schedule, keep)

    def finish(pictures: np.ndarray) -> np.ndarray:
        return paste(pictures, inputs.reference, inputs.mask, args.mask_blur) if args.paste_original else pictures

    run.make(model, inputs, timesteps, sample, finish)


if __name__ == "__main__":
    execute(main)
