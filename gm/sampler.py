"""Samplers over noise levels, one function each: denoiser(x, sigma) -> clean x is all they know of the network.

Each is a generator of x after every step, S in all, so that the caller owns the progress bar. They share arguments:
    denoise: (x, sigma) -> predicted clean x, guidance included.
    x: (B, C, H, W) float32 at the first level.
    sigmas: (S + 1,) falling, the last one 0 (`gm.discretizer.discretize`).
    fresh_noise: () -> noise like x, unit variance; only ancestral samplers call it.
    keep: called after each step with x and its level (None when clean), returns x; see `ldm.sampling.ddim.KeptRegion`.
"""
from __future__ import annotations

from typing import Callable, Iterator

import numpy as np
from mindspore import Tensor


def sample_euler(denoise: Callable, x: Tensor, sigmas: np.ndarray, fresh_noise: Callable | None = None,
                 keep: Callable | None = None) -> Iterator[Tensor]:
    """Euler's method; arXiv 2206.00364, algorithm 2 without churn and without its second half."""
    for sigma, following in zip(sigmas, sigmas[1:]):
        slope = (x - denoise(x, sigma)) * float(1 / sigma)
        x = _kept(x + slope * float(following - sigma), following, keep)
        yield x


def sample_euler_ancestral(denoise: Callable, x: Tensor, sigmas: np.ndarray, fresh_noise: Callable,
                           keep: Callable | None = None) -> Iterator[Tensor]:
    """Euler's method to below each level, and new noise up to it.

    Source:
        crowsonkb/k-diffusion: k_diffusion/sampling.py, sample_euler_ancestral with eta = 1.
    """
    for sigma, following in zip(sigmas, sigmas[1:]):
        up = following * np.sqrt(1 - (following / sigma) ** 2)
        down = following**2 / sigma
        slope = (x - denoise(x, sigma)) * float(1 / sigma)
        x = x + slope * float(down - sigma)
        if following > 0:
            x = x + fresh_noise() * float(up)
        x = _kept(x, following, keep)
        yield x


def sample_heun(denoise: Callable, x: Tensor, sigmas: np.ndarray, fresh_noise: Callable | None = None,
                keep: Callable | None = None) -> Iterator[Tensor]:
    """Heun's method, two calls a step but for the last; arXiv 2206.00364, algorithm 1."""
    for sigma, following in zip(sigmas, sigmas[1:]):
        slope = (x - denoise(x, sigma)) * float(1 / sigma)
        ahead = x + slope * float(following - sigma)
        if following > 0:
            slope = (slope + (ahead - denoise(ahead, following)) * float(1 / following)) * 0.5
            ahead = x + slope * float(following - sigma)
        x = _kept(ahead, following, keep)
        yield x


def sample_dpmpp_2m(denoise: Callable, x: Tensor, sigmas: np.ndarray, fresh_noise: Callable | None = None,
                    keep: Callable | None = None) -> Iterator[Tensor]:
    """DPM-Solver++(2M); arXiv 2211.01095, algorithm 2, with lambda = -log sigma. The last step is of first order."""
    earlier, h_earlier = None, None
    for sigma, following in zip(sigmas, sigmas[1:]):
        clean = denoise(x, sigma)
        if following == 0:
            x = clean
        else:
            h = np.log(sigma / following)
            guess = clean
            if earlier is not None:
                r = h_earlier / h
                guess = clean * float(1 + 0.5 / r) - earlier * float(0.5 / r)
            x = x * float(following / sigma) - guess * float(np.expm1(-h))
            earlier, h_earlier = clean, h
        x = _kept(x, following, keep)
        yield x


def _kept(x: Tensor, level: float, keep: Callable | None) -> Tensor:
    return x if keep is None else keep(x, level if level > 0 else None)


# By the names of `gm.choices`.
SAMPLERS = {"EulerEDMSampler": sample_euler, "EulerAncestralSampler": sample_euler_ancestral,
            "HeunEDMSampler": sample_heun, "DPMPP2MSampler": sample_dpmpp_2m}
