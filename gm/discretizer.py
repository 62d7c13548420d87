"""The noise levels a sampler goes through, from noisy to clean, in float64 NumPy."""
from __future__ import annotations

import numpy as np

from ldm.sampling.schedule import TRAIN_STEPS, NoiseSchedule, kept_steps, leading_timesteps

RHO = 7.0  # of the EDM levels


def discretize(name: str, steps: int, strength: float = 1.0, schedule: NoiseSchedule = NoiseSchedule()) -> np.ndarray:
    """Noise levels of a run.

    Args:
        name: one of DISCRETIZATIONS.
        steps: S, 1 to 1000.
        strength: above 0, at most 1; only the last int(S * strength) steps are kept.
        schedule: the schedule the network was trained with.

    Returns:
        (int(S * strength) + 1,) float64 sigmas, falling, the last one 0.

    Raises:
        UserError: out of range, or nothing is left.
    """
    kept = kept_steps(steps, strength)
    return np.append(DISCRETIZATIONS[name](steps, schedule)[steps - kept :], 0.0)


def _leading(steps: int, schedule: NoiseSchedule) -> np.ndarray:
    """Those of the timesteps DDIM goes through; diffusers' default for SDXL."""
    return schedule.sigmas()[leading_timesteps(steps)]


def _legacy(steps: int, schedule: NoiseSchedule) -> np.ndarray:
    """Timesteps equally spaced from 999 down.

    Source:
        Stability-AI/generative-models: sgm/modules/diffusionmodules/discretizer.py, LegacyDDPMDiscretization.
    """
    return schedule.sigmas()[np.linspace(TRAIN_STEPS - 1, 0, steps, endpoint=False).astype(int)]


def _edm(steps: int, schedule: NoiseSchedule) -> np.ndarray:
    """Between the schedule's highest and lowest level, closer together towards the end.

    Source:
        arXiv 2206.00364, eq. 5.
    """
    low, high = schedule.sigmas()[[0, -1]] ** (1 / RHO)
    return np.linspace(high, low, steps) ** RHO


DISCRETIZATIONS = {"DiffusersDDPMDiscretization": _leading, "LegacyDDPMDiscretization": _legacy,
                   "EDMDiscretization": _edm}
