"""DDIM sampling (arXiv 2010.02502) without added noise (eta = 0)."""
from __future__ import annotations

from typing import Callable, Iterator

import numpy as np
from mindspore import Tensor

from ldm.schedule import NoiseSchedule, leading_timesteps


def sample_ddim(denoise: Callable[[Tensor, int], Tensor], x: Tensor, steps: int,
                schedule: NoiseSchedule = NoiseSchedule()) -> Iterator[Tensor]:
    """Sample step by step, so that the caller owns the progress bar.

    Args:
        denoise: (x_t, t) -> predicted noise, guidance included.
        x: (B, C, H, W) float32 starting noise of unit variance.
        steps: how many steps S, 1 to 1000.
        schedule: the noise schedule.

    Yields:
        x after each step, S times; the last one is the clean latent.

    Source:
        arXiv 2010.02502, eq. 12 with sigma = 0.
    """
    alphas = schedule.alphas_cumprod()
    timesteps = leading_timesteps(steps)
    for t, alpha, alpha_next in zip(timesteps, alphas[timesteps], next_alphas(alphas, timesteps)):
        noise = denoise(x, int(t))
        # eq. 12: the predicted x_0, and the direction that points to x_t; both folded into two factors.
        scale = np.sqrt(alpha_next / alpha)
        shift = np.sqrt(1.0 - alpha_next) - scale * np.sqrt(1.0 - alpha)
        x = x * float(scale) + noise * float(shift)
        yield x


def next_alphas(alphas: np.ndarray, timesteps: np.ndarray) -> np.ndarray:
    """alpha bar after each step; the last step goes to that of timestep 0, not to 1."""
    return np.append(alphas[timesteps[1:]], alphas[0])
