"""A reference picture within a run: where sampling starts, what of it is kept, and the last touch to the pictures."""
from __future__ import annotations

import argparse
from typing import Callable

import numpy as np
from mindspore import Tensor

from ip_adapter.images.preprocess import latent_mask, latent_pixels, paste
from ip_adapter.inference.inputs import Inputs
from ip_adapter.weights.loading import ImagePromptModel
from ldm.sampling.ddim import KeptRegion


class Reference:
    """The reference of a run, or that there is none.

    Args:
        model: ready to encode pictures.
        inputs: of the run.
        args: parsed flags; `strength`, and with a mask those of `ip_adapter.cli.inference.add_mask_flags`.
        add_noise: (clean, noise, level) -> clean as noisy as the sampler's level has it.
    """

    def __init__(self, model: ImagePromptModel, inputs: Inputs, args: argparse.Namespace, add_noise: Callable):
        self.picture, self.mask, self.args, self.add_noise = inputs.reference, inputs.mask, args, add_noise
        self.clean = None if self.picture is None else model.diffusion.encode_image(latent_pixels(self.picture))

    def start(self, noise: Tensor, level: float, alone: Tensor) -> Tensor:
        """Latents at the first level.

        Args:
            noise: (B, C, H, W) float32, unit variance.
            level: timestep or sigma.
            alone: what to start from without a reference; so does inpainting at strength 1.
        """
        if self.clean is None or self.mask is not None and self.args.strength == 1:
            return alone
        return self.add_noise(self.clean, noise, level)

    def keep(self, noise: Tensor) -> KeptRegion | None:
        """What holds the part of the reference that is not repainted, for samplers."""
        if self.mask is None:
            return None
        return KeptRegion(self.clean, noise, latent_mask(self.mask), self.add_noise)

    def finish(self, pictures: np.ndarray) -> np.ndarray:
        """(B, H, W, 3) uint8 with the kept pixels put back, unless a flag says no."""
        if self.mask is None or not self.args.paste_original:
            return pictures
        return paste(pictures, self.picture, self.mask, self.args.mask_blur)
