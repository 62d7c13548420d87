"""The noise schedule and the timesteps of a sampler, in float64 NumPy until they meet a tensor."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ldm.errors import UserError

TRAIN_STEPS = 1000


@dataclass(frozen=True)
class NoiseSchedule:
    """A schedule whose square roots of beta rise linearly ("scaled_linear"), and what a network predicts under it.

    Attributes:
        beta_start: beta of timestep 0.
        beta_end: beta of timestep 999.
        prediction: "eps" for the noise, "v" for the velocity of arXiv 2202.00512, appendix D. Where little of the
            picture is left, the noise is nearly the input itself, and a small error of it a large one of the picture;
            the velocity there is the picture.
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction: str = "eps"

    def __post_init__(self):
        if self.prediction not in ("eps", "v"):
            raise UserError(f"`prediction` is {self.prediction}, expected eps or v")

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

    def timestep_shares(self, k: float) -> np.ndarray | None:
        """How often a training that leans to noisy timesteps draws each: (1000,) float64 that add up to 1.

        The error of the noise is large where little is left to decide, and small where colours and outlines are; the
        weight 1 / (k + signal-to-noise ratio) evens that out. An error of the velocity counts as the one of the noise
        that follows from it, alpha bar times as large. Drawing by these weights has the mean of weighing errors, and
        spends no step on samples that hardly count.

        Args:
            k: the smaller (above 0), the more of the noisiest timesteps; 0 for all alike, which is None.

        Source:
            Perception Prioritized Training (arXiv 2204.00227), eq. 8 with gamma 1, as shares.
        """
        if not k:
            return None
        alpha = self.alphas_cumprod()
        weights = (alpha if self.prediction == "v" else 1.0) / (k + alpha / (1.0 - alpha))
        return weights / weights.sum()

    def add_noise(self, latents, noise, timestep):
        """Clean latents as they are at a timestep.

        Args:
            latents: (B, C, H, W), Tensor or array.
            noise: the same shape, unit variance.
            timestep: one for all, or (B,) int64 for arrays.

        Source:
            DDPM (arXiv 2006.11239), eq. 4.
        """
        signal, sigma = self._factors(timestep)
        return latents * signal + noise * sigma

    def target(self, latents, noise, timestep):
        """What the network should predict for what `add_noise` gives; the arguments are the same."""
        if self.prediction == "eps":
            return noise
        signal, sigma = self._factors(timestep)
        return noise * signal - latents * sigma

    def noise_in(self, x, prediction, timestep):
        """The noise in noisy latents, from what the network predicts for them.

        Args:
            x: (B, C, H, W), as `add_noise` gives it.
            prediction: the same shape.
            timestep: one for all, whole or between two.
        """
        if self.prediction == "eps":
            return prediction
        signal, sigma = self._factors(timestep)
        return prediction * signal + x * sigma

    def _factors(self, timestep) -> tuple:
        """What picture and noise are multiplied by: numbers, or (B, 1, 1, 1) for as many timesteps."""
        logs = np.interp(timestep, np.arange(TRAIN_STEPS), np.log(self.sigmas()))
        alpha = 1.0 / (1.0 + np.exp(2.0 * logs))
        factors = np.sqrt(alpha), np.sqrt(1.0 - alpha)
        return tuple(f.reshape(-1, 1, 1, 1) if np.ndim(timestep) else float(f) for f in factors)


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
