"""What a run of SDXL can choose by name: samplers, noise levels, guidance. Only names; the code is beside this file."""
from __future__ import annotations

# The names of the original code, and those that diffusers, ComfyUI and A1111 use for the same.
SAMPLERS = {"EulerEDMSampler": "euler", "EulerAncestralSampler": "euler_a", "HeunEDMSampler": "heun",
            "DPMPP2MSampler": "dpmpp_2m"}
DISCRETIZATIONS = ("DiffusersDDPMDiscretization", "LegacyDDPMDiscretization", "EDMDiscretization")
GUIDERS = ("VanillaCFG", "IdentityGuider")


def guidance(guider: str, scale: float) -> float:
    """The scale of classifier-free guidance: `scale`, or 1 (no guidance) for the guider that has none."""
    return scale if guider == "VanillaCFG" else 1.0
