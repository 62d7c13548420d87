"""2-D convolution: the device's own operator on Ascend; on the CPU matrix products of columns or of small tiles."""
from __future__ import annotations

import math

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.common.initializer import HeUniform, initializer

from ldm.device import on_ascend
from ldm.modules.operators import BiasAdd, Reordered, in_turn, joined, pad

# Largest column matrix built at a time, in elements (64 MiB of float32). A 3x3 convolution of 128 channels at 512x512
# would need 1.2 GB at once.
COLUMN_ELEMENTS = 1 << 24
# Up to this many output positions one product over the whole batch beats one per picture.
SMALL_MAP = 256
# Points of the tiles' polynomials, by the side of a tile: those of Lavin and Gray for 2; for 4 such that the result has
# five times the rounding of a direct sum, where theirs (0, 1, -1, 2, -2) has ten (arXiv 1803.10986). All are exact in
# float32, and so are their products.
TILE_POINTS = {4: (0, 0.75, -0.75, 1.5, -1.5), 2: (0, 1, -1)}
# With fewer output positions than this, transforming the weight costs more than the tiles save; with fewer channels,
# transforming the picture does.
TILED_POSITIONS, TILED_CHANNELS = 450, 16
# Largest array of transformed tiles at a time, and of transformed weights, in elements: those of 2560 x 1280 channels
# together would be 0.5 GB.
TILE_ELEMENTS, WEIGHT_ELEMENTS = 1 << 24, 1 << 25


class Conv2d(nn.Cell):
    """2-D convolution, (B, C, H, W) -> (B, C', H', W').

    On Ascend it is the device's own operator. On the CPU that operator falls into a reference loop. There 3x3
    convolutions in float32 multiply tiles (`by_tiles`), with a half to a quarter of the products; others unfold the
    picture into columns and multiply those by the weight, which is 50 to 300 times as fast as the reference loop.
    Large maps are taken in row blocks.

    Args:
        in_channels: C.
        out_channels: C'.
        kernel_size: side of the square kernel.
        stride: step between outputs.
        padding: zeros around the picture; an int, or (top, bottom, left, right).
        has_bias: whether there is a bias.
        dtype: of weight, bias and output.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding=0,
                 has_bias: bool = True, dtype=mstype.float32):
        super().__init__()
        self.in_channels, self.out_channels, self.has_bias = in_channels, out_channels, has_bias
        self.kernel_size, self.stride = kernel_size, stride
        self.padding = (padding,) * 4 if isinstance(padding, int) else tuple(padding)
        self.depth = in_channels * kernel_size * kernel_size
        # PyTorch's default initialisation
        self.weight = Parameter(initializer(HeUniform(math.sqrt(5)), (out_channels, in_channels, kernel_size,
                                                                      kernel_size), dtype))
        self.bias = Parameter(initializer("zeros", (out_channels,), dtype)) if has_bias else None
        self.native = on_ascend()
        self.tiled = ((kernel_size, stride, self.padding, dtype) == (3, 1, (1,) * 4, mstype.float32)
                      and in_channels >= TILED_CHANNELS)
        self.conv = ops.Conv2D(out_channels, kernel_size, pad_mode="pad", pad=self.padding, stride=stride)
        self.bias_add = BiasAdd()
        self.swap, self.turn = Reordered((1, 0, 2)), Reordered((2, 1, 0, 3))
        self.transforms = {side: tuple(Tensor(np.kron(matrix, matrix).astype(np.float32))
                                       for matrix in tile_transforms(side)) for side in TILE_POINTS}

    def construct(self, x: Tensor) -> Tensor:
        if self.native:
            y = self.conv(x, self.weight)
        else:
            # depend: a graph would transform the weights of all layers first, and keep 4 GB of them.
            weight = ops.depend(self.weight, x).reshape((self.out_channels, self.depth))
            side = self.tile_side(x.shape)
            y = self.by_tiles(x, weight, side) if side else self.by_columns(x, weight)
        return self.bias_add(y, self.bias) if self.has_bias else y

    def tile_side(self, shape: tuple) -> int:
        """The side of the tiles that a (B, C, H, W) input is cut into, 0 for columns instead."""
        batch, _, height, width = shape
        if self.tiled and batch * height * width >= TILED_POSITIONS:
            for side in TILE_POINTS:
                if height % side == 0 and width % side == 0:
                    return side
        return 0

    def by_tiles(self, x: Tensor, weight: Tensor, side: int) -> Tensor:
        """A 3x3 convolution as products of transformed tiles, without its bias.

        A tile of m x m outputs follows from (m + 2)^2 inputs; transformed, each of these is multiplied over the
        channels alone. That makes 36 products for 16 outputs, or 16 for 4, in place of 9 for each.

        Args:
            x: (B, C, H, W), H and W multiples of m; one row and column of zeros are put around it.
            weight: (C', 9 C).
            side: m.

        Returns:
            (B, C', H, W).

        Source:
            arXiv 1509.09308 (Lavin and Gray), section 4: F(2 x 2, 3 x 3) and F(4 x 4, 3 x 3) as products of matrices.
        """
        batch, channels, height, width = x.shape
        of_input, of_weight, to_output = self.transforms[side]
        count, across = of_input.shape[0], width // side
        row = count * max(channels, self.out_channels) * batch * across
        rows = side * min(height // side, max(1, TILE_ELEMENTS // row))
        padding = 1
        if rows < height:
            x, padding = pad(x, (1, 1, 0, 0)), (0, 1)
        blocks = []
        for first in range(0, height, rows):
            here = min(rows, height - first)
            block = x if here == height else in_turn(ops.narrow(x, 2, first, here + 2), blocks)
            tiles = ops.unfold(block, side + 2, padding=padding, stride=side)
            positions = here // side * across
            tiles = self.turn(tiles.reshape((batch, channels, count, positions)))
            tiles = ops.MatMul()(of_input, tiles.reshape((count, channels * batch * positions)))
            y = _tile_products(tiles.reshape((count, channels, batch * positions)), weight, of_weight, to_output)
            y = self.turn(y.reshape((side * side, self.out_channels, batch, positions)))
            y = y.reshape((batch, self.out_channels * side * side, positions))
            blocks.append(ops.fold(y, _size(here, width), (side, side), stride=(side, side)))
        return joined(blocks, 2)

    def by_columns(self, x: Tensor, weight: Tensor) -> Tensor:
        """The picture unfolded into columns of what each output sees, times the (C', k k C) weight; without its bias.

        (B, C, H, W) -> (B, C', H', W').
        """
        batch, _, height, width = x.shape
        top, bottom, left, right = self.padding
        k, s = self.kernel_size, self.stride
        out_h, out_w = (height + top + bottom - k) // s + 1, (width + left + right - k) // s + 1
        rows = max(1, COLUMN_ELEMENTS // (self.depth * out_w))
        inside = top if top == bottom == left == right and rows >= out_h else 0
        if inside == 0:
            x = pad(x, self.padding)
        if batch > 1 and out_h * out_w <= SMALL_MAP:  # one wide product over the whole batch
            columns = self.swap(self.columns(x, inside)).reshape((self.depth, batch * out_h * out_w))
            y = self.swap(ops.MatMul()(weight, columns).reshape((self.out_channels, batch, out_h * out_w)))
            return y.reshape((batch, self.out_channels, out_h, out_w))
        pictures = []
        for picture in (ops.split(x, 1, 0) if batch > 1 else (x,)):
            picture, blocks = in_turn(picture, pictures), []
            for first in range(0, out_h, rows):
                here = min(rows, out_h - first)
                block = picture
                if here < out_h:
                    block = in_turn(ops.narrow(picture, 2, first * s, (here - 1) * s + k), blocks)
                y = ops.MatMul()(weight, self.columns(block, inside).reshape((self.depth, here * out_w)))
                blocks.append(y.reshape((1, self.out_channels, here, out_w)))
            pictures.append(joined(blocks, 2))
        return joined(pictures, 0)

    def columns(self, x: Tensor, padding: int) -> Tensor:
        """(B, C, H, W) -> (B, k k C, positions)."""
        if self.kernel_size == 1 and self.stride == 1:
            return x.reshape((x.shape[0], x.shape[1], x.shape[2] * x.shape[3]))
        return ops.unfold(x, self.kernel_size, padding=padding, stride=self.stride)


@ops.constexpr
def _size(height: int, width: int) -> Tensor:
    return Tensor([height, width], mstype.int32)


def _tile_products(tiles: Tensor, weight: Tensor, of_weight: Tensor, to_output: Tensor) -> Tensor:
    """((m + 2)^2, C, N) transformed tiles times (C', 9 C) weights -> (m^2, C', N) tiles of the output."""
    count, channels, positions = tiles.shape
    together, parts = max(1, WEIGHT_ELEMENTS // (count * channels)), []
    for first in range(0, weight.shape[0], together):
        here = min(together, weight.shape[0] - first)
        part = weight if here == weight.shape[0] else in_turn(ops.narrow(weight, 0, first, here), parts)
        part = ops.MatMul(transpose_b=True)(of_weight, part.reshape((here * channels, 9)))
        y = ops.BatchMatMul()(part.reshape((count, here, channels)), tiles)
        y = ops.MatMul()(to_output, y.reshape((count, here * positions)))
        parts.append(y.reshape((to_output.shape[0], here, positions)))
    return joined(parts, 1)


def tile_transforms(side: int) -> tuple:
    """What transforms tiles in one dimension: B^T of the input, G of the weight and A^T of the output, float64 arrays.

    A tile of m outputs under 3 weights is the product of two polynomials, found from its values at m + 1 points and
    at infinity.

    Args:
        side: m, one of TILE_POINTS.

    Returns:
        (m + 2, m + 2), (m + 2, 3) and (m, m + 2).

    Source:
        Toom and Cook's construction as arXiv 1803.10986 has it; names as in arXiv 1509.09308.
    """
    points = np.array(TILE_POINTS[side], float)
    others = [np.delete(points, j) for j in range(side + 1)]
    scales = np.array([np.prod(point - other) for point, other in zip(points, others)])
    infinity = np.eye(side + 2)[-1]
    # The rows of B^T are the coefficients of (x - other points), lowest first; the last one of (x - all points).
    of_input = np.stack([np.append(np.poly(other)[::-1], 0.0) for other in others] + [np.poly(points)[::-1]])
    of_weight = np.concatenate((points[:, None] ** np.arange(3) / scales[:, None], [[0.0, 0.0, 1.0]]))
    of_output = np.stack([np.append(points**i, 0.0) + infinity * (i == side - 1) for i in range(side)])
    return of_input, of_weight, of_output
