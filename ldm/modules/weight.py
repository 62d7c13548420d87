"""Weights, of which some are kept in another shape than files have them."""
from __future__ import annotations

import math

from mindspore import Parameter
from mindspore.common.initializer import Uniform, initializer


def initial_weight(stored: tuple[int, ...], dtype, kept: tuple[int, ...] | None = None) -> Parameter:
    """A weight with PyTorch's default initialisation (He uniform, a = sqrt(5)).

    Args:
        stored: its shape in files, (out, in, ...).
        dtype: of its elements.
        kept: its shape in the network, with the elements in the same order: the one it is multiplied in, for a graph
            copies whatever parameter it reshapes, at every call. None is that of the file.
    """
    bound = 1 / math.sqrt(math.prod(stored[1:]))
    parameter = Parameter(initializer(Uniform(bound), kept or stored, dtype))
    parameter.stored_shape = stored
    return parameter


def stored_shape(parameter: Parameter) -> tuple[int, ...]:
    """The shape that files have a parameter in."""
    return getattr(parameter, "stored_shape", tuple(parameter.shape))
