"""Record what diffusers' schedulers make of a formula in place of a network, for the tests of samplers in gm and ldm.

python tests/record/record_samplers.py tests/data/sampler_reference.npz     (torch 2.13.0, diffusers 0.42.1)
"""
from __future__ import annotations

import sys

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from diffusers.schedulers import scheduling_euler_ancestral_discrete

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEADING = {**BETAS, "timestep_spacing": "leading", "steps_offset": 1}
SCHEDULERS = {
    "euler": EulerDiscreteScheduler(**LEADING),
    "euler_karras": EulerDiscreteScheduler(**LEADING, use_karras_sigmas=True),
    "euler_ancestral": EulerAncestralDiscreteScheduler(**LEADING),
    "heun": HeunDiscreteScheduler(**LEADING),
    "dpmpp_2m": DPMSolverMultistepScheduler(**BETAS, algorithm_type="dpmsolver++", solver_order=2,
                                            final_sigmas_type="zero"),
    "euler_v": EulerDiscreteScheduler(**LEADING, prediction_type="v_prediction"),
    "ddim_v": DDIMScheduler(**LEADING, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False),
}
STEPS = 9


def predicted(x: torch.Tensor, t: float) -> torch.Tensor:
    """The formula: bounded, not linear, different at every timestep."""
    return torch.tanh(0.7 * x + float(t) / 1000) - 0.1 * x


def main() -> None:
    """Run every scheduler on the same start and the same fresh noise."""
    rng = np.random.default_rng(5)
    start = rng.standard_normal((2, 4, 3, 5)).astype(np.float32)
    fresh = rng.standard_normal((STEPS, 2, 4, 3, 5)).astype(np.float32)
    recorded = {"start": start, "fresh": fresh}
    for name, scheduler in SCHEDULERS.items():
        drawn = iter(fresh)
        scheduling_euler_ancestral_discrete.randn_tensor = lambda *a, drawn=drawn, **k: torch.from_numpy(next(drawn))
        if name == "dpmpp_2m":  # its own leading spacing differs by one step; these are the timesteps of the others
            scheduler.set_timesteps(timesteps=(np.arange(STEPS) * (1000 // STEPS) + 1)[::-1].tolist())
        else:
            scheduler.set_timesteps(STEPS)
        # DPM-Solver and DDIM work on x of unit variance, the others on x whose noise has deviation sigma.
        x = torch.from_numpy(start) * (1.0 if name == "dpmpp_2m" else scheduler.init_noise_sigma)
        for t in scheduler.timesteps:
            x = scheduler.step(predicted(scheduler.scale_model_input(x, t), t), t, x, return_dict=False)[0]
        recorded[name] = x.numpy()
        if name != "ddim_v":
            recorded[name + "_sigmas"] = np.asarray(scheduler.sigmas)
    np.savez(sys.argv[1], **recorded)


if __name__ == "__main__":
    main()
