"""The noise schedule and the timesteps of a sampler, in float64 NumPy until they meet a tensor."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ldm.errors import UserError

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

    def sigmas(self) -> np.ndarray:
        """(1000,) float64, rising: the noise's deviation where the picture keeps its own scale."""
        alpha = self.alphas_cumprod()
        return np.sqrt((1.0 - alpha) / alpha)

    def loss_weights(self, k: float) -> np.ndarray | None:
        """(1000,) float32 with mean 1, or None for k = 0: weights of the noise's error that lean to noisy timesteps.

        The error of the noise is large where little is left to decide, and small where colours and outlines are; the
        weight 1 / (k + signal-to-noise ratio) evens that out.

        Args:
            k: the smaller (above 0), the more weight on the noisiest timesteps.

        Source:
            Perception Prioritized Training (arXiv 2204.00227), eq. 8 with gamma 1.
        """
        if not k:
            return None
        alpha = self.alphas_cumprod()
        weights = 1.0 / (k + alpha / (1.0 - alpha))
        return (weights / weights.mean()).astype(np.float32)

    def add_noise(self, latents, noise, timestep):
        """Clean latents as they are at a timestep.

        Args:
            latents: (B, C, H, W), Tensor or array.
            noise: the same shape, unit variance.
            timestep: one for all, or (B,) int64 for arrays.

        Source:
            DDPM (arXiv 2006.11239), eq. 4.
        """
        alpha = self.alphas_cumprod()[timestep]
        factors = np.sqrt(alpha), np.sqrt(1.0 - alpha)
        signal, sigma = (f.reshape(-1, 1, 1, 1) if np.ndim(timestep) else float(f) for f in factors)
        return latents * signal + noise * sigma


def leading_timesteps(steps: int, strength: float = 1.0) -> np.ndarray:
    """Timesteps from noisy to clean: multiples of 1000 // steps, plus one, at most 999.

    Args:
        steps: S, 1 to 1000.
        strength: above 0, at most 1; only the last int(S * strength) timesteps are kept, for an image that is changed
            instead of made anew.

    Returns:
        (int(S * strength),) int64.

    Raises:
        UserError: out of range, or nothing is left.

    Source:
        huggingface/diffusers: src/diffusers/schedulers/scheduling_ddim.py, "leading" spacing with steps_offset 1;
        src/diffusers/pipelines/stable_diffusion/pipeline_stable_diffusion_img2img.py, get_timesteps.
    """
    kept = kept_steps(steps, strength)
    timesteps = np.minimum(np.arange(steps) * (TRAIN_STEPS // steps) + 1, TRAIN_STEPS - 1)[::-1]
    return timesteps[steps - kept :].copy()


def kept_steps(steps: int, strength: float) -> int:
    """How many of the steps are run: int(S * strength).

    Raises:
        UserError: out of range, or nothing is left.
    """
    if not 1 <= steps <= TRAIN_STEPS:
        raise UserError(f"`steps` is {steps}, expected 1 to {TRAIN_STEPS}")
    if not 0 <= strength <= 1:
        raise UserError(f"`strength` is {strength}, expected 0 to 1 (1 keeps nothing of the image)")
    kept = int(steps * strength)
    if kept == 0:
        raise UserError(f"--strength {strength} leaves none of the {steps} steps; expected at least {1 / steps:.3g}, "
                        "or more --sampling_steps")
    return kept
