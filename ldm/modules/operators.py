"""Operators that the CPU computes slowly as MindSpore has them, made of those it computes fast; on Ascend they are the
same. On the CPU operands of unequal shapes take twenty times as long as equal ones made by a product with ones, norms
three times as long as what they are made of, and in gradients sums over an axis ten times as long as such a product.
"""
from __future__ import annotations

import functools
import math
from typing import Callable

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, no_inline, ops
from mindspore import dtype as mstype

from ldm.device import on_ascend

# From so many elements on a graph is worth the time to compile it.
LARGE = 1 << 18

# Made once: to make them at each call took a seventh of a demo run in PyNative. n: operand as it is, t: transposed.
matmul, matmul_nt = ops.MatMul(), ops.MatMul(transpose_b=True)
matmul_tt = ops.MatMul(transpose_a=True, transpose_b=True)
batch_matmul, batch_matmul_nt = ops.BatchMatMul(), ops.BatchMatMul(transpose_b=True)
batch_matmul_tn = ops.BatchMatMul(transpose_a=True)
gather = ops.Gather()


class BiasAdd(nn.Cell):
    """A bias added to every row of (N, C), or to every map of (B, C, H, W)."""

    def __init__(self):
        super().__init__()
        self.operator = ops.BiasAdd()

    def construct(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.operator(x, bias)

    def bprop(self, x: Tensor, bias: Tensor, out: Tensor, dout: Tensor) -> tuple:
        """The gradients of x and of the bias."""
        rows = dout
        if dout.ndim == 4:
            batch, channels, height, width = dout.shape
            rows = matmul(dout.reshape((batch * channels, height * width)),
                          ops.ones((height * width, 1), dout.dtype)).reshape((batch, channels))
        total = matmul(ops.ones((1, rows.shape[0]), dout.dtype), rows)
        return dout, total.reshape(bias.shape)


bias_add = BiasAdd()


def with_bias(x: Tensor, bias: Tensor | None) -> Tensor:
    """x with a bias added as `bias_add` does, where there is one."""
    return x if bias is None else bias_add(x, bias)


class WeightedValues(nn.Cell):
    """softmax(q k^T) v, the softmax in float32.

    The gradient of the softmax needs, for every query, the sum of its weights times their gradients; that is the sum
    of the output times its gradient (arXiv 2205.14135, appendix B.2), over fewer numbers, and is subtracted
    within the product that makes the weights' gradients: [dy, -sum] [v, 1]^T.
    """

    def __init__(self):
        super().__init__()
        self.softmax = ops.Softmax(-1)

    def construct(self, q: Tensor, k: Tensor, v: Tensor) -> tuple:
        """(G, N, d) scaled queries, (G, T, d) keys and values -> (G, N, d), and the (G, N, T) float32 weights."""
        weights = self.softmax(batch_matmul_nt(q, k).astype(mstype.float32))
        return batch_matmul(weights.astype(v.dtype), v), weights

    def bprop(self, q: Tensor, k: Tensor, v: Tensor, out: tuple, dout: tuple) -> tuple:
        """The gradients of q, k and v; that of the weights is not looked at, for nothing but `construct` uses them."""
        y, weights = out
        dy = dout[0]
        total = batch_matmul(dy * y, ops.ones((y.shape[0], y.shape[2], 1), y.dtype))
        ones = ops.ones((v.shape[0], v.shape[1], 1), v.dtype)
        dscores = batch_matmul_nt(ops.concat((dy, -total), -1), ops.concat((v, ones), -1))
        dscores = (dscores.astype(mstype.float32) * weights).astype(q.dtype)
        dv = batch_matmul_tn(weights.astype(v.dtype), dy)
        return batch_matmul(dscores, k), batch_matmul_tn(dscores, q), dv


weighted_values = WeightedValues()


class Reordered(nn.Cell):
    """A transpose that leaves the last axis, or more of the last ones, where they are.

    On the CPU their rows are gathered. MindSpore's own transpose copies a view in PyNative, four times as slowly, and
    for a graph lists the place of every element when it compiles: 8 to 16 bytes each that are kept, and 60 ns.

    Args:
        axes: of the input, in their new order.
    """

    def __init__(self, axes: tuple):
        super().__init__()
        self.axes, self.inverse = axes, tuple(int(n) for n in np.argsort(axes))

    def construct(self, x: Tensor) -> Tensor:
        return _reordered(x, self.axes)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple:
        """The gradient in the old order; that of gather itself adds up row after row."""
        return (_reordered(dout, self.inverse),)


def _reordered(x: Tensor, axes: tuple) -> Tensor:
    order, size, shape = _row_order(x.shape, axes)
    if shape is None:
        return ops.transpose(x, axes)
    if order is None:
        return x.reshape(shape)
    return gather(x.reshape((-1, size)), order, 0).reshape(shape)


@ops.constexpr
@functools.lru_cache(None)
def _row_order(shape: tuple, axes: tuple) -> tuple:
    """Which rows a transpose takes, None if all stay where they are; how long one is; and the new shape.

    That is None on Ascend, which transposes as fast.
    """
    if on_ascend():
        return None, 0, None
    moved = max((n + 1 for n, axis in enumerate(axes) if n != axis), default=0)
    order = np.arange(math.prod(shape[:moved])).reshape(shape[:moved]).transpose(axes[:moved]).ravel()
    stays = (order == np.arange(len(order))).all()
    return (None if stays else Tensor(order.astype(np.int32)), math.prod(shape[moved:]),
            tuple(shape[axis] for axis in axes))


swap_first_two, swap_inner, reverse_first_three = Reordered((1, 0, 2)), Reordered((0, 2, 1, 3)), Reordered((2, 1, 0, 3))


def shared(function: Callable) -> Callable:
    """A decorator for what layers have in common, so that a graph has it but once for all layers of equal shapes.

    On the CPU MindSpore tries for each elementwise operator of a graph how many threads serve it best, with one thread
    in its first five calls: those of five steps, or of one where five layers share the operator. And it compiles
    faster. The fewer tensors go in and out the better, for each of them crosses from graph to graph. One call must need
    the result of the last one: MindSpore mixes up those that it may make side by side.

    Args:
        function: of tensors, then Parameters, then what is known when the graph is compiled.

    Returns:
        (inlined, tensors, Parameters, *settings) -> what `function` gives, each a tuple but the first. `inlined` makes
        it part of the graph at each call all the same: on Ascend, which does not search, and after `inline`.
    """

    @no_inline
    def apart(*arguments):
        return function(*arguments)

    def call(inlined: bool, inputs: tuple, weights: tuple, *settings):
        if inlined:
            return function(*inputs, *weights, *settings)
        after = [ops.depend(weight, inputs[0]) for weight in weights]  # else those of the first call would be kept
        return apart(*inputs, *after, *settings)

    return call


def inline(network: nn.Cell) -> None:
    """Make everything `shared` in a network part of the graph at each call: where another network may run beside it, or
    where activations are recomputed, in which MindSpore would find a cycle."""
    for _, cell in network.cells_and_names():
        if hasattr(cell, "inlined"):
            cell.inlined = True


def worth_a_graph(x: Tensor, plain: bool) -> bool:
    """Whether a norm of x is better called as a graph of products: on the CPU, of what is too large for its caches.

    In PyNative each operator leaves the cache before the next reads it. Small tensors are not worth the time to
    compile, nor is anything on Ascend (`plain`), where a graph for each shape costs more. Whole convolutions and
    attentions are not worth it either: a shape takes a second to compile, and its graph holds its last inputs and
    outputs.
    """
    return not plain and x.size >= LARGE


def spread(column: Tensor, count: int) -> Tensor:
    """(R, 1) -> (R, count), every number along its row."""
    return matmul(column, ops.ones((1, count), column.dtype))


def add_to_maps(x: Tensor, values: Tensor) -> Tensor:
    """(B, C, H, W) with a value, of (B, C), added to all of each map."""
    batch, channels, height, width = x.shape
    return raised(x.reshape((batch * channels, height * width)), values).reshape(x.shape)


def raised(rows: Tensor, shift: Tensor) -> Tensor:
    """(R, N), with R numbers added, one along each row."""
    maps = bias_add(rows.reshape((1, rows.shape[0], rows.shape[1], 1)), shift.reshape((rows.shape[0],)))
    return maps.reshape(rows.shape)


def rescaled(rows: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """(R, N), every row times one of R gains plus one of R shifts: in one pass, as batch normalisation of channels of
    mean 0 and variance 1."""
    count, length = rows.shape
    zeros, ones = ops.zeros((count,), rows.dtype), ops.ones((count,), rows.dtype)
    batch_norm = ops.BatchNorm(is_training=False, epsilon=1e-20)  # an epsilon that does not change the 1
    maps = rows.reshape((1, count, length, 1))
    return batch_norm(maps, gain.reshape((count,)), shift.reshape((count,)), zeros, ones)[0].reshape(rows.shape)


def enlarged(x: Tensor, height: int, width: int) -> Tensor:
    """Nearest-neighbour enlargement of (B, C, H, W); to twice the size on the CPU as an exact product with ones and
    zeros, in a quarter of the time of MindSpore's operator, which runs on one thread."""
    rows = _twice(x.shape[2], x.shape[3], height, width)
    if rows is None:
        return ops.interpolate(x, size=(height, width), mode="nearest")
    y = matmul(x.reshape((-1, x.shape[3])), rows.astype(x.dtype))
    return y.reshape((x.shape[0], x.shape[1], height, width))


@ops.constexpr
@functools.lru_cache(None)
def _twice(height: int, width: int, new_height: int, new_width: int) -> Tensor | None:
    """(W, 4 W): from a row to two equal ones that have its numbers twice; None if a size is another, and on Ascend."""
    if on_ascend() or (new_height, new_width) != (2 * height, 2 * width):
        return None
    return Tensor(np.tile(np.repeat(np.eye(width, dtype=np.float32), 2, 1), 2))


def centred(rows: Tensor, epsilon: float) -> tuple:
    """(R, N) -> (R, N) less the mean of each row, and (R, 1) their standard deviations with epsilon in the variance."""
    count = rows.shape[1]
    average = ops.fill(rows.dtype, (count, 1), 1 / count)
    rows = raised(rows, -matmul(rows, average))
    return rows, ops.sqrt(matmul(rows * rows, average) + epsilon)


@ms.jit
def layer_norm(x: Tensor, gamma: Tensor, beta: Tensor, epsilon: float) -> Tensor:
    """Layer normalisation of (R, C) with (1, C) gain and shift; biased variance."""
    rows, deviations = centred(x, epsilon)
    return bias_add(rows * matmul(1 / deviations, gamma), beta.reshape((x.shape[1],)))


class NormedGroups(nn.Cell):
    """Group normalisation, and by hand its gradient: both in as few passes over the maps as there are."""

    def construct(self, x: Tensor, gamma: Tensor, beta: Tensor, groups: int, epsilon: float) -> tuple:
        """As `group_norm` has them -> that; (B groups, N) x less its means; and (B groups, 1) deviations."""
        batch, channels, height, width = x.shape
        rows, deviations = centred(x.reshape((batch * groups, channels // groups * height * width)), epsilon)
        gain = _of_pictures(gamma, batch) / _of_channels(deviations, channels // groups)
        y = rescaled(rows.reshape((batch * channels, height * width)), gain, _of_pictures(beta, batch))
        return y.reshape(x.shape), rows, deviations

    def bprop(self, x: Tensor, gamma: Tensor, beta: Tensor, groups: int, epsilon: float, out: tuple,
              dout: tuple) -> tuple:
        """The gradients of x, gain and shift.

        With z = (x - mean) / deviation and g = gain * dy, that of x is (g - mean(g) - z mean(g z)) / deviation, the
        means over a group.
        """
        _, rows, deviations = out
        batch, channels, height, width = x.shape
        group = channels // groups
        by_channel = _of_channels(deviations, group)
        dy, ones = dout[0].reshape((batch * channels, height * width)), ops.ones((height * width, 1), x.dtype)
        sums = matmul(dy, ones)
        products = matmul(dy * rows.reshape(dy.shape), ones) / by_channel
        gains, average = _of_pictures(gamma, batch), ops.fill(x.dtype, (group, 1), 1 / (group * height * width))
        mean_g = matmul((gains * sums).reshape((-1, group)), average)
        mean_gz = matmul((gains * products).reshape((-1, group)), average)
        dx = rescaled(dy, gains / by_channel, -_of_channels(mean_g / deviations, group))
        dx = dx.reshape(rows.shape) - rescaled(rows, mean_gz / (deviations * deviations), ops.zeros_like(mean_gz))
        ones = ops.ones((1, batch), x.dtype)
        dgamma, dbeta = (matmul(ones, part.reshape((batch, channels))) for part in (products, sums))
        return dx.reshape(x.shape), dgamma, dbeta, 0, 0.0


normed_groups = NormedGroups()


def _of_channels(column: Tensor, count: int) -> Tensor:
    """(R, 1) of groups -> (R count, 1) of the channels in them."""
    return spread(column, count).reshape((-1, 1))


def _of_pictures(row: Tensor, count: int) -> Tensor:
    """(1, C) of all pictures -> (count C, 1) of each."""
    return matmul(ops.ones((count, 1), row.dtype), row).reshape((-1, 1))


@ms.jit
def group_norm(x: Tensor, gamma: Tensor, beta: Tensor, groups: int, epsilon: float) -> Tensor:
    """Group normalisation of (B, C, H, W) with (1, C) gain and shift; biased variance."""
    return normed_groups(x, gamma, beta, groups, epsilon)[0]


def repeated_like(x: Tensor, other: Tensor) -> Tensor:
    """x, (B, ...), as often as the batch of the other holds it: what both sides of the guidance share is made once."""
    if x.shape[0] == other.shape[0]:
        return x
    return ops.concat((x,) * (other.shape[0] // x.shape[0]), 0)


def portions(count: int, most: int) -> tuple:
    """(first, how many) of portions of at most so many; to plan a loop with, in an `ops.constexpr`."""
    return tuple((first, min(most, count - first)) for first in range(0, count, most))


def in_turn(x: Tensor, results: list) -> Tensor:
    """x, for what is to begin when the last of `results` is there: a graph would make all portions side by side."""
    return ops.depend(x, results[-1]) if results else x


def joined(parts: list, axis: int) -> Tensor:
    """The portions along an axis as one; a single one is not copied."""
    return parts[0] if len(parts) == 1 else ops.concat(parts, axis)


def pad(x: Tensor, padding: tuple) -> Tensor:
    """(B, C, H, W) with zeros around it: (top, bottom, left, right). The CPU's own Pad takes eighty times as long."""
    for axis, (before, after) in ((2, padding[:2]), (3, padding[2:])):
        parts = [ops.zeros(x.shape[:axis] + (size,) + x.shape[axis + 1:], x.dtype) for size in (before, after) if size]
        if before and after:
            x = ops.concat((parts[0], x, parts[1]), axis)
        elif parts:
            x = ops.concat((parts[0], x) if before else (x, parts[0]), axis)
    return x
