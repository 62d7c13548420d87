"""Pictures made within another program, for validation and evaluation; the scripts' own run is `run.py`."""
from __future__ import annotations

from typing import Callable, Sequence

import numpy as np
from mindspore import Tensor

from ip_adapter.weights.loading import ImagePromptModel
from ldm.model import Control


def generate(model: ImagePromptModel, sides: tuple, seeds: Sequence[int], size: int, steps: int,
             guidance_scale: float, controls: list[Control] = (), keep: Callable | None = None) -> np.ndarray:
    """Make square pictures with the family's usual sampler, from noise alone.

    Args:
        model: patched.
        sides: of the guidance, of one picture: what `ImagePromptModel.conditions` gives for a prompt.
        seeds: one for each of the B pictures, each the only source of its noise.
        size: side in pixels.
        steps: of the sampler.
        guidance_scale: of classifier-free guidance.
        controls: hints, for all pictures of the batch.
        keep: noise -> what samplers take to hold a part as it is, or None.

    Returns:
        (B, size, size, 3) uint8.
    """
    diffusion = model.diffusion
    shape = diffusion.unet.config.in_channels, size // 8, size // 8
    noise = Tensor(np.stack([np.random.default_rng(seed).standard_normal(shape, np.float32) for seed in seeds]))
    denoise = diffusion.denoiser(*(side.repeated(len(seeds)) for side in sides), guidance_scale, controls)
    *_, latents = diffusion.sample(denoise, noise, steps, keep(noise) if keep else None)
    return diffusion.decode(latents)
