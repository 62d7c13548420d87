"""DDIM sampling (arXiv 2010.02502) without added noise (eta = 0), of whole pictures or of a part of one."""
from __future__ import annotations

from typing import Callable, Iterator

import numpy as np
from mindspore import Tensor

from ldm.sampling.schedule import NoiseSchedule


def sample_ddim(denoise: Callable[[Tensor, int], Tensor], x: Tensor, timesteps: np.ndarray,
                schedule: NoiseSchedule = NoiseSchedule(), keep: Callable | None = None) -> Iterator[Tensor]:
    """Sample step by step, so that the caller owns the progress bar.

    Args:
        denoise: (x_t, t) -> predicted noise, guidance included.
        x: (B, C, H, W) float32 at the first timestep: noise of unit variance, or `NoiseSchedule.add_noise`.
        timesteps: (S,) from noisy to clean, as `leading_timesteps` gives them.
        schedule: the noise schedule.
        keep: called after each step with x and the next timestep (None after the last), returns x; see `KeptRegion`.

    Yields:
        x after each step, S times; the last one is the clean latent.

    Source:
        arXiv 2010.02502, eq. 12 with sigma = 0.
    """
    alphas = schedule.alphas_cumprod()
    following = [int(t) for t in timesteps[1:]] + [None]
    for t, t_next, alpha, alpha_next in zip(timesteps, following, alphas[timesteps], next_alphas(alphas, timesteps)):
        noise = denoise(x, int(t))
        # eq. 12: the predicted x_0, and the direction that points to x_t; both folded into two factors.
        scale = np.sqrt(alpha_next / alpha)
        shift = np.sqrt(1.0 - alpha_next) - scale * np.sqrt(1.0 - alpha)
        x = x * float(scale) + noise * float(shift)
        if keep is not None:
            x = keep(x, t_next)
        yield x


def next_alphas(alphas: np.ndarray, timesteps: np.ndarray) -> np.ndarray:
    """alpha bar after each step; the last step goes to that of timestep 0, not to 1."""
    return np.append(alphas[timesteps[1:]], alphas[0])


class KeptRegion:
    """Holds a part of the latents at the original while the rest is repainted.

    Args:
        clean: (1, C, H, W) float32 latents of the original.
        noise: (B, C, H, W) float32, that the sampling started from.
        mask: (1, 1, H, W) float32 array, 1 where it is repainted, 0 where it is kept.
        add_noise: (clean, noise, level) -> clean as noisy as the level has it, `NoiseSchedule.add_noise` for DDIM.

    Source:
        huggingface/diffusers: src/diffusers/pipelines/stable_diffusion/pipeline_stable_diffusion_inpaint.py, for
        UNets with 4 input channels.
    """

    def __init__(self, clean: Tensor, noise: Tensor, mask: np.ndarray, add_noise: Callable = NoiseSchedule().add_noise):
        self.clean, self.noise, self.mask, self.add_noise = clean, noise, Tensor(mask), add_noise

    def __call__(self, x: Tensor, level) -> Tensor:
        """x after a step, with the kept part as noisy as its timestep (or sigma) has it; clean if that is None."""
        kept = self.clean if level is None else self.add_noise(self.clean, self.noise, level)
        return self.mask * x + (1.0 - self.mask) * kept
