"""How weights and biases begin, and which of them are kept in another shape than files have them."""
from __future__ import annotations

import math

from mindspore import Parameter
from mindspore.common.initializer import Uniform, initializer


def initial_weight(stored: tuple[int, ...], kept: tuple[int, ...], dtype) -> Parameter:
    """A weight with PyTorch's default initialisation (He uniform, a = sqrt(5)).

    Args:
        stored: its shape in files, (out, in, ...).
        kept: its shape in the network, with the elements in the same order: the one it is multiplied in, for a graph
            copies whatever parameter it reshapes, at every call.
        dtype: of its elements.
    """
    bound = 1 / math.sqrt(math.prod(stored[1:]))
    parameter = Parameter(initializer(Uniform(bound), kept, dtype))
    parameter.stored_shape = stored
    return parameter


def initial_bias(channels: int, dtype) -> Parameter:
    """A bias, or the shift of a norm: (channels,) zeros."""
    return Parameter(initializer("zeros", (channels,), dtype))


def stored_shape(parameter: Parameter) -> tuple[int, ...]:
    """The shape that files have a parameter in."""
    return getattr(parameter, "stored_shape", tuple(parameter.shape))
