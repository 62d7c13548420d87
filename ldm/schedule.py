"""The noise schedule and the timesteps of a sampler, in float64 NumPy."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TRAIN_STEPS = 1000


@dataclass(frozen=True)
class NoiseSchedule:
    """A schedule whose square roots of beta rise linearly ("scaled_linear").

    Attributes:
        beta_start: beta of timestep 0.
        beta_end: beta of timestep 999.
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012

    def alphas_cumprod(self) -> np.ndarray:
        """(1000,) float64: the share of the picture's variance that is left at each timestep.

        Source:
            DDPM (arXiv 2006.11239), eq. 4: alpha bar.
        """
        betas = np.linspace(self.beta_start ** 0.5, self.beta_end ** 0.5, TRAIN_STEPS) ** 2
        return np.cumprod(1.0 - betas)


def leading_timesteps(steps: int) -> np.ndarray:
    """(steps,) int64 timesteps from noisy to clean: multiples of 1000 // steps, plus one, at most 999.

    Raises:
        ValueError: `steps` is not in 1 to 1000.

    Source:
        huggingface/diffusers: src/diffusers/schedulers/scheduling_ddim.py, "leading" spacing with steps_offset 1.
    """
    if not 1 <= steps <= TRAIN_STEPS:
        raise ValueError(f"`steps` is {steps}, expected 1 to {TRAIN_STEPS}")
    return np.minimum(np.arange(steps) * (TRAIN_STEPS // steps) + 1, TRAIN_STEPS - 1)[::-1].copy()
