"""2-D convolution: the device's own operator on Ascend; on the CPU matrix products of columns or of small tiles."""
from __future__ import annotations

import functools

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from ldm.device import on_ascend
from ldm.modules.operators import (
    add_to_maps,
    batch_matmul,
    in_turn,
    joined,
    matmul,
    matmul_nt,
    pad,
    portions,
    reverse_first_three,
    swap_first_two,
    with_bias,
)
from ldm.modules.weight import initial_bias, initial_weight

# Largest column matrix built at a time, in elements (64 MiB of float32). A 3x3 convolution of 128 channels at 512x512
# would need 1.2 GB at once.
COLUMN_ELEMENTS = 1 << 24
# Up to this many output positions one product over the whole batch beats one per picture.
SMALL_MAP = 256
# Points of the tiles' polynomials, by the side of a tile: those of Lavin and Gray for 2; for 4 such that the result has
# five times the rounding of a direct sum, where theirs (0, 1, -1, 2, -2) has ten (arXiv 1803.10986). All are exact in
# float32, and so are their products.
TILE_POINTS = {4: (0, 0.75, -0.75, 1.5, -1.5), 2: (0, 1, -1)}
# With fewer output positions than this, by the side of a tile, transforming the weight costs more than the tiles save;
# with fewer channels, transforming the picture does.
TILED_POSITIONS, TILED_CHANNELS = {4: 1024, 2: 128}, 16
# Largest array of transformed tiles at a time, and of transformed weights, in elements: those of 2560 x 1280 channels
# together would be 0.5 GB.
TILE_ELEMENTS, WEIGHT_ELEMENTS = 1 << 24, 1 << 25


class Conv2d(nn.Cell):
    """2-D convolution, (B, C, H, W) -> (B, C', H', W').

    On Ascend it is the device's own operator. On the CPU that operator falls into a reference loop. There 3x3
    convolutions in float32 multiply tiles (`_by_tiles`), with a half to a quarter of the products; others unfold the
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
        self.stride = stride
        self.padding = (padding,) * 4 if isinstance(padding, int) else tuple(padding)
        self.native = on_ascend()
        self.tiled = (not self.native and in_channels >= TILED_CHANNELS
                      and (kernel_size, stride, self.padding, dtype) == (3, 1, (1,) * 4, mstype.float32))
        self.shape = out_channels, in_channels, kernel_size, kernel_size
        matrix = (out_channels * in_channels, 9) if self.tiled else (out_channels, in_channels * kernel_size**2)
        self.weight = initial_weight(self.shape, self.shape if self.native else matrix, dtype)
        self.bias = initial_bias(out_channels, dtype) if has_bias else None
        self.conv = ops.Conv2D(out_channels, kernel_size, pad_mode="pad", pad=self.padding, stride=stride)

    def construct(self, x: Tensor, shift: Tensor = None) -> Tensor:
        """Convolve.

        Args:
            x: (B, C, H, W).
            shift: (B, C') added to the maps as well, at no cost beside the bias; or None.

        Returns:
            (B, C', H', W').
        """
        bias = self.bias if shift is None else None
        if self.native:
            y = with_bias(self.conv(x, self.weight), bias)
        else:
            y = convolve(x, self.weight, bias, self.shape, self.stride, self.padding, self.tiled)
        return y if shift is None else add_to_maps(y, with_bias(shift, self.bias))


# What follows are functions, not methods, for the time a graph takes to compile: layers of equal shapes share a
# function, while each has methods of its own. Loops are planned outside of the graph for the same reason.


def convolve(x: Tensor, matrix: Tensor, bias, shape: tuple, stride: int, padding: tuple, tiled: bool) -> Tensor:
    """A convolution on the CPU.

    Args:
        x: (B, C, H, W).
        matrix: the weight: (C', C k k), or (C' C, 9) if tiled.
        bias: (C',) or None.
        shape: of the weight: (C', C, k, k).
        stride: step between outputs.
        padding: zeros around the picture: (top, bottom, left, right).
        tiled: whether tiles may be taken: k is 3, the stride and all paddings are 1, in float32.

    Returns:
        (B, C', H', W').
    """
    side = tile_side(x.shape) if tiled else 0
    # depend: a graph would transform the weights of all layers first, and keep 4 GB of them.
    matrix = ops.depend(matrix, x)
    if side:
        return with_bias(_by_tiles(x, matrix, shape[0], side), bias)
    if tiled:  # and the map is small
        matrix = matrix.reshape((shape[0], -1))
    return with_bias(_by_columns(x, matrix, shape[2], stride, padding), bias)


@ops.constexpr
def tile_side(shape: tuple) -> int:
    """The side of the tiles that a (B, C, H, W) input is cut into, 0 for columns instead."""
    batch, _, height, width = shape
    sides = (side for side, positions in TILED_POSITIONS.items()
             if height % side == 0 and width % side == 0 and batch * height * width >= positions)
    return next(sides, 0)


def _by_tiles(x: Tensor, matrix: Tensor, out_channels: int, side: int) -> Tensor:
    """A 3x3 convolution as products of transformed tiles.

    A tile of m x m outputs follows from (m + 2)^2 inputs; transformed, each of these is multiplied over the
    channels alone. That makes 36 products for 16 outputs, or 16 for 4, in place of 9 for each.

    Args:
        x: (B, C, H, W), H and W multiples of m; one row and column of zeros are put around it.
        matrix: (C' C, 9), the weight.
        out_channels: C'.
        side: m.

    Returns:
        (B, C', H, W).

    Source:
        arXiv 1509.09308 (Lavin and Gray), section 4: F(2 x 2, 3 x 3) and F(4 x 4, 3 x 3) as products of matrices.
    """
    rows = _tile_rows(x.shape, out_channels, side, TILE_ELEMENTS)
    if len(rows) == 1:
        return _of_tiles(x, matrix, side, 1)
    x, blocks = pad(x, (1, 1, 0, 0)), []
    for first, count in rows:
        blocks.append(_of_tiles(in_turn(ops.narrow(x, 2, first, count + 2), blocks), matrix, side, (0, 1)))
    return ops.concat(blocks, 2)


@ops.constexpr
def _tile_rows(shape: tuple, out_channels: int, side: int, most: int) -> tuple:
    """(first row, how many) of what is made at a time, from at most so many elements of transformed tiles."""
    batch, channels, height, width = shape
    row = (side + 2) ** 2 * max(channels, out_channels) * batch * (width // side)
    return portions(height, side * max(1, most // row))


def _of_tiles(x: Tensor, matrix: Tensor, side: int, padding) -> Tensor:
    """`_by_tiles` of (B, C, R, W) with a padding of 1, or of (B, C, R + 2, W) with one of (0, 1): (B, C', R, W)."""
    tiles = reverse_first_three(ops.Im2Col(side + 2, side, 1, padding)(x))  # ((m + 2)^2, C, B, positions)
    count, channels, batch, _ = tiles.shape
    tiles = matmul(_transforms(side)[0], tiles.reshape((count, -1))).reshape((count, channels, -1))
    y = _tile_products(tiles, matrix, side)
    y = reverse_first_three(y.reshape((y.shape[0], y.shape[1], batch, -1)))  # (B, C', m^2, positions)
    return ops.Col2Im(side, 1, 0, side)(y, _size(x.shape, padding))


@ops.constexpr
def _size(shape: tuple, padding) -> Tensor:
    """Height and width of the output of `_of_tiles`."""
    return Tensor([shape[2] - 2 * (padding != 1), shape[3]], mstype.int32)


def _tile_products(tiles: Tensor, matrix: Tensor, side: int) -> Tensor:
    """((m + 2)^2, C, N) transformed tiles times (C' C, 9) weights -> (m^2, C', N) tiles of the output."""
    rows = _weight_rows(tiles.shape, matrix.shape, WEIGHT_ELEMENTS)
    if len(rows) == 1:
        return _tile_product(tiles, matrix, side)
    parts = []
    for first, count in rows:
        parts.append(_tile_product(tiles, in_turn(ops.narrow(matrix, 0, first, count), parts), side))
    return ops.concat(parts, 1)


@ops.constexpr
def _weight_rows(tiles: tuple, matrix: tuple, most: int) -> tuple:
    """(first row, how many) of the weights of some output channels, of at most so many elements once transformed."""
    return portions(matrix[0], tiles[1] * max(1, most // (tiles[0] * tiles[1])))


def _tile_product(tiles: Tensor, matrix: Tensor, side: int) -> Tensor:
    count, channels, positions = tiles.shape
    _, of_weight, to_output = _transforms(side)
    weights = matmul_nt(of_weight, matrix).reshape((count, -1, channels))
    y = batch_matmul(weights, tiles)
    return matmul(to_output, y.reshape((count, -1))).reshape((side * side, -1, positions))


@ops.constexpr
@functools.lru_cache(None)
def _transforms(side: int) -> tuple:
    """`tile_transforms` in two dimensions, as tensors: what transforms input, weight and output."""
    return tuple(Tensor(np.kron(matrix, matrix).astype(np.float32)) for matrix in tile_transforms(side))


def _by_columns(x: Tensor, matrix: Tensor, kernel: int, stride: int, padding: tuple) -> Tensor:
    """The picture unfolded into columns of what each output sees, times the (C', C k k) weight."""
    rows, inside, (out_h, out_w) = _column_plan(x.shape, kernel, stride, padding, COLUMN_ELEMENTS)
    batch, (out_channels, seen) = x.shape[0], matrix.shape
    if inside == 0 and max(padding) > 0:
        x = pad(x, padding)
    if batch > 1 and out_h * out_w <= SMALL_MAP:  # one wide product over the whole batch
        columns = swap_first_two(_columns(x, kernel, stride, inside))
        y = matmul(matrix, columns.reshape((seen, -1)))
        return swap_first_two(y.reshape((out_channels, batch, -1))).reshape((batch, out_channels, out_h, out_w))
    pictures = []
    for picture in ops.split(x, 1, 0) if batch > 1 else (x,):
        picture, blocks = in_turn(picture, pictures), []
        for first, count in rows:
            block = picture
            if len(rows) > 1:
                block = in_turn(ops.narrow(picture, 2, first * stride, (count - 1) * stride + kernel), blocks)
            columns = _columns(block, kernel, stride, inside).reshape((seen, -1))
            blocks.append(matmul(matrix, columns).reshape((1, out_channels, count, out_w)))
        pictures.append(joined(blocks, 2))
    return joined(pictures, 0)


@ops.constexpr
def _column_plan(shape: tuple, kernel: int, stride: int, padding: tuple, most: int) -> tuple:
    """(first row, how many) of at most so many elements of columns; zeros to put around the picture as it is unfolded,
    where that does; height and width of the output."""
    _, channels, height, width = shape
    top, bottom, left, right = padding
    out_h, out_w = (height + top + bottom - kernel) // stride + 1, (width + left + right - kernel) // stride + 1
    rows = portions(out_h, max(1, most // (channels * kernel * kernel * out_w)))
    return rows, top if top == bottom == left == right and len(rows) == 1 else 0, (out_h, out_w)


def _columns(x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """(B, C, H, W) -> (B, k k C, positions)."""
    if kernel == 1 and stride == 1:
        return x.reshape((x.shape[0], x.shape[1], -1))
    return ops.Im2Col(kernel, stride, 1, padding)(x).reshape((x.shape[0], x.shape[1] * kernel * kernel, -1))


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
