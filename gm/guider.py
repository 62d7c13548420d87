"""Which guidance a run uses, by the names of the original code."""
from __future__ import annotations

GUIDERS = ("VanillaCFG", "IdentityGuider")


def guidance(guider: str, scale: float) -> float:
    """The scale of classifier-free guidance: that asked for, or 1, the positive side alone."""
    return scale if guider == "VanillaCFG" else 1.0
