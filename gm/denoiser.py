"""A network that predicts the noise at a timestep, as the denoiser D(x, sigma) that EDM samplers call."""
from __future__ import annotations

from typing import Callable

import numpy as np
from mindspore import Tensor

from ldm.sampling.schedule import NoiseSchedule


class Denoiser:
    """Predicts the clean x.

    Args:
        predict_noise: (x, t) -> noise, for x of unit variance at timestep t, guidance included.
        schedule: the noise it was trained with.

    Source:
        arXiv 2206.00364, eq. 7 with the values of DDPM networks: c_skip = 1, c_out = -sigma,
        c_in = 1 / sqrt(sigma^2 + 1), c_noise = the timestep of sigma.
    """

    def __init__(self, predict_noise: Callable[[Tensor, float], Tensor], schedule: NoiseSchedule = NoiseSchedule()):
        self.predict_noise, self.schedule = predict_noise, schedule

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """(B, C, H, W) float32 with noise of deviation `sigma` -> what it would be without."""
        noise = self.predict_noise(x * float((sigma**2 + 1) ** -0.5), float(timesteps_of(sigma, self.schedule)))
        return x - noise * float(sigma)


def timesteps_of(sigma, schedule: NoiseSchedule = NoiseSchedule()) -> np.ndarray:
    """Timesteps of noise levels, interpolated in log sigma; whole numbers for those of the schedule.

    Source:
        crowsonkb/k-diffusion: k_diffusion/external.py, sigma_to_t without quantisation.
    """
    logs = np.log(schedule.sigmas())
    return np.interp(np.log(sigma), logs, np.arange(len(logs)))


def add_noise(latents, noise, sigma: float):
    """Clean latents as they are at a noise level; both (B, C, H, W), the noise of unit variance."""
    return latents + noise * float(sigma)


def starting_noise(noise, sigma: float):
    """Noise of unit variance as what sampling starts from at a level: as if it were pictures plus their noise."""
    return noise * float((sigma**2 + 1) ** 0.5)
