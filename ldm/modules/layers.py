"""Small layers that every network shares: projections, norms, resampling, time embedding."""
from __future__ import annotations

import math

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.common.initializer import initializer

from ldm.device import on_ascend
from ldm.modules.convolution import Conv2d
from ldm.modules.operators import (
    enlarged,
    group_norm,
    layer_norm,
    matmul_nt,
    matmul_tt,
    portions,
    raised,
    rescaled,
    swap_first_two,
    with_bias,
    worth_a_graph,
)
from ldm.modules.weight import initial_bias, initial_weight

# Of larger feature maps, in elements (256 MiB of float32), what lies between norm and convolution is made in row
# blocks.
MAP_ELEMENTS = 1 << 26


class Linear(nn.Cell):
    """y = x W^T + b over the last axis.

    Args:
        in_channels: C of the input.
        out_channels: C of the output.
        has_bias: whether there is a bias.
        as_convolution: whether files have the weight as (out, in, 1, 1), as those of 1x1 convolutions do.
        dtype: of weight, bias and output.
    """

    def __init__(self, in_channels: int, out_channels: int, has_bias: bool = True, as_convolution: bool = False,
                 dtype=mstype.float32):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        matrix = out_channels, in_channels
        self.weight = initial_weight(matrix + (1, 1) * as_convolution, matrix, dtype)
        self.bias = initial_bias(out_channels, dtype) if has_bias else None

    def construct(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def from_maps(self, x: Tensor) -> Tensor:
        """What `construct` gives for each position of (B, C, N) maps: (B, N, C'). The product turns them."""
        return _linear_from_maps(x, self.weight, self.bias)

    def to_maps(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, C', N): the maps of what `construct` gives."""
        return _linear_to_maps(x, self.weight, self.bias)


# Functions, not methods, for the time a graph takes to compile: all layers of equal shapes share them.


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What `Linear` gives: (..., C) times an (C', C) weight, with a (C',) bias or none."""
    rows, shape = _linear_shapes(x.shape, weight.shape)
    y = matmul_nt(x.reshape(rows), weight)
    return with_bias(y, bias).reshape(shape)


def halves(x: Tensor, weight: Tensor, bias: Tensor) -> tuple:
    """The first and the second half of the channels of `linear`; a product for each is cheaper than cutting one."""
    weights, biases = ops.split(weight, weight.shape[0] // 2, 0), ops.split(bias, bias.shape[0] // 2, 0)
    return linear(x, weights[0], biases[0]), linear(x, weights[1], biases[1])


@ops.constexpr
def _linear_shapes(x: tuple, weight: tuple) -> tuple:
    """The shapes of the input as a matrix, and of the output."""
    return (math.prod(x[:-1]), x[-1]), x[:-1] + weight[:1]


def _linear_from_maps(x: Tensor, weight: Tensor, bias) -> Tensor:
    batch, channels, count = x.shape
    y = matmul_tt(swap_first_two(x).reshape((channels, -1)), weight)
    return with_bias(y, bias).reshape((batch, count, -1))


def _linear_to_maps(x: Tensor, weight: Tensor, bias) -> Tensor:
    batch, count, channels = x.shape
    y = matmul_nt(weight, x.reshape((-1, channels)))
    y = swap_first_two(y.reshape((-1, batch, count)))
    return with_bias(y.reshape((batch, -1, count, 1)), bias).reshape(y.shape)


class GroupNorm(nn.Cell):
    """Group normalisation of (B, C, H, W) in float32, whatever the input's dtype; the output has the input's dtype."""

    def __init__(self, channels: int, groups: int = 32, epsilon: float = 1e-5):
        super().__init__()
        self.groups, self.epsilon = groups, epsilon
        self.gamma = Parameter(initializer("ones", (channels,), mstype.float32))
        self.beta = initial_bias(channels, mstype.float32)
        self.plain = on_ascend()

    def construct(self, x: Tensor) -> Tensor:
        return _normed_maps(x, self.gamma, self.beta, self.groups, self.epsilon, self.plain)

    def affine(self, x: Tensor, rows: int) -> tuple:
        """Gain and shift, (B C, 1) float32: x * gain + shift is what `construct` gives. Reads `rows` at a time."""
        batch, channels, height, width = x.shape
        size = channels // self.groups * height * width
        mean = self._total(x, rows, ops.zeros((batch * self.groups, 1), mstype.float32), False) / size
        deviation = ops.sqrt(self._total(x, rows, mean, True) / size + self.epsilon)
        mean, deviation = (ops.repeat_elements(part, channels // self.groups, 0) for part in (mean, deviation))
        gamma, beta = (ops.tile(part.reshape((channels, 1)), (batch, 1)) for part in (self.gamma, self.beta))
        gain = gamma / deviation
        return gain, beta - mean * gain

    def scaled(self, block: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        """Some rows of x, (B, C, R, W), with what `affine` gave; the dtype stays."""
        maps = block.astype(mstype.float32).reshape((gain.shape[0], -1))
        maps = maps * gain + shift if self.plain else rescaled(maps, gain, shift)
        return maps.reshape(block.shape).astype(block.dtype)

    def _total(self, x: Tensor, rows: int, mean: Tensor, squared: bool) -> Tensor:
        """(B groups, 1): the sum over each group of x - mean, or of its square."""
        total = 0.0
        for first in range(0, x.shape[2], rows):
            block = ops.narrow(x, 2, first, min(rows, x.shape[2] - first)).astype(mstype.float32)
            block = block.reshape((mean.shape[0], -1))
            block = block - mean if self.plain else raised(block, -mean)
            total = total + (block * block if squared else block).sum(-1, keepdims=True)
        return total


def _normed_maps(x: Tensor, gamma: Tensor, beta: Tensor, groups: int, epsilon: float, plain: bool) -> Tensor:
    y = x.astype(mstype.float32)
    if worth_a_graph(y, plain):
        y = group_norm(y, gamma.reshape((1, -1)), beta.reshape((1, -1)), groups, epsilon)
    else:
        y = ops.group_norm(y, groups, gamma, beta, epsilon)
    return y.astype(x.dtype)


class LayerNorm(nn.Cell):
    """Layer normalisation over the last axis in float32, whatever the input's dtype."""

    def __init__(self, channels: int, epsilon: float = 1e-5):
        super().__init__()
        self.epsilon, self.plain = epsilon, on_ascend()
        self.gamma = Parameter(initializer("ones", (channels,), mstype.float32))
        self.beta = initial_bias(channels, mstype.float32)

    def construct(self, x: Tensor) -> Tensor:
        return _normed_rows(x, self.gamma, self.beta, self.epsilon, self.plain)


def _normed_rows(x: Tensor, gamma: Tensor, beta: Tensor, epsilon: float, plain: bool) -> Tensor:
    y = x.astype(mstype.float32)
    if worth_a_graph(y, plain):
        y = layer_norm(y.reshape((-1, x.shape[-1])), gamma.reshape((1, -1)), beta.reshape((1, -1)), epsilon)
        y = y.reshape(x.shape)
    else:
        y = ops.LayerNorm(-1, -1, epsilon)(y, gamma, beta)[0]
    return y.astype(x.dtype)


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x), any shape."""
    return x * ops.sigmoid(x)


def gelu(x: Tensor) -> Tensor:
    """The exact GELU, any shape; ops.gelu(approximate="none") divides and takes three passes more."""
    return _gelu(x)[0]


class GELU(nn.Cell):
    """x -> x times the normal distribution function, and erf(x / sqrt 2), which the gradient needs as well."""

    def construct(self, x: Tensor) -> tuple:
        x = x * math.sqrt(0.5)
        erf = ops.erf(x)
        return x * (erf * math.sqrt(0.5) + math.sqrt(0.5)), erf

    def bprop(self, x: Tensor, out: tuple, dout: tuple) -> tuple:
        """Distribution function plus x times density; MindSpore squares for it by a power of 3 ns an element."""
        density = ops.exp(x * x * -0.5) * (1 / math.sqrt(2 * math.pi))
        return (dout[0] * (out[1] * 0.5 + 0.5 + x * density),)


_gelu = GELU()


class SiLU(nn.Cell):
    """`silu` as a cell, to stand in a SequentialCell at the index published names count."""

    def construct(self, x: Tensor) -> Tensor:
        return silu(x)


class Upsample(nn.Cell):
    """Nearest-neighbour enlargement to a given size, then a 3x3 convolution."""

    def __init__(self, channels: int, dtype=mstype.float32):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1, dtype=dtype)

    def construct(self, x: Tensor, height: int, width: int) -> Tensor:
        rows = rows_of(x.shape[0] * x.shape[1] * width * height // x.shape[2], x.shape[2])
        if rows == x.shape[2] or height != 2 * x.shape[2]:
            return self.conv(enlarged(x, height, width))
        blocks = []
        for first, count, low, end in row_blocks(x.shape[2], rows):
            block = enlarged(ops.narrow(x, 2, low, end - low), 2 * (end - low), width)
            blocks.append(ops.narrow(self.conv(block), 2, 2 * (first - low), 2 * count))
        return ops.concat(blocks, 2)


def normed_conv(norm: GroupNorm, conv: Conv2d, x: Tensor) -> Tensor:
    """conv(silu(norm(x))) of a 3x3 convolution; of a large map never more than a row block is normalised at a time."""
    rows = rows_of(x.shape[0] * x.shape[1] * x.shape[3], x.shape[2])
    if rows == x.shape[2]:
        return conv(silu(norm(x)))
    gain, shift = norm.affine(x, rows)
    blocks = []
    for first, count, low, end in row_blocks(x.shape[2], rows):
        block = norm.scaled(ops.narrow(x, 2, low, end - low), gain, shift)
        blocks.append(ops.narrow(conv(silu(block)), 2, first - low, count))
    return ops.concat(blocks, 2)


def rows_of(row_elements: int, height: int) -> int:
    """How many of `height` rows are taken at a time."""
    return min(height, max(1, MAP_ELEMENTS // row_elements))


@ops.constexpr
def row_blocks(height: int, rows: int) -> tuple:
    """(first row, how many, first row read, end of what is read): a 3x3 convolution needs one more on each side."""
    return tuple((first, count, max(0, first - 1), min(height, first + count + 1))
                 for first, count in portions(height, rows))


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding, cosines first.

    Args:
        timesteps: (B,) int or float.
        dim: even width D of the embedding.

    Returns:
        (B, D) float32.

    Source:
        CompVis/latent-diffusion: ldm/modules/diffusionmodules/util.py.
    """
    half = dim // 2
    frequencies = Tensor(np.exp(-math.log(10000.0) * np.arange(half, dtype=np.float32) / half).astype(np.float32))
    angles = timesteps.astype(mstype.float32).reshape((-1, 1)) * frequencies
    return ops.concat((ops.cos(angles), ops.sin(angles)), 1)
