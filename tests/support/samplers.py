"""Formulas of samplers."""
from __future__ import annotations

from mindspore import Tensor, ops


def formula(x: Tensor, t: float) -> Tensor:
    """What tests/record/record_samplers.py has in place of a network."""
    return ops.tanh(0.7 * x + t / 1000) - 0.1 * x
