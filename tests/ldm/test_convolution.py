"""Convolution against its definition, however it is computed."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

import ldm.modules.convolution as convolution
from ldm.modules.convolution import TILE_POINTS, Conv2d, tile_side, tile_transforms
from tests.support.arrays import fill, normal


def convolve(x, weight, bias, stride, padding) -> np.ndarray:
    """Convolution by definition, float64."""
    top, bottom, left, right = padding
    x = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (top, bottom), (left, right)))
    k = weight.shape[2]
    windows = np.lib.stride_tricks.sliding_window_view(x, (k, k), (2, 3))[:, :, ::stride, ::stride]
    return np.einsum("bchwij,ocij->bohw", windows, weight.astype(np.float64)) + bias.reshape(-1, 1, 1)


@pytest.mark.parametrize("columns", [1 << 24, 500])  # in one piece, and in row blocks
@pytest.mark.parametrize("kernel, stride, padding", [
    (3, 1, 1), (3, 2, 1), (3, 2, (0, 1, 0, 1)), (1, 1, 0), (14, 14, 0), (3, 1, (2, 0, 1, 3))])
@pytest.mark.parametrize("size", [(17, 14), (28, 30)])  # few positions, many positions
def test_convolution(monkeypatch, columns, kernel, stride, padding, size):
    monkeypatch.setattr(convolution, "COLUMN_ELEMENTS", columns)
    conv = Conv2d(5, 7, kernel, stride, padding)
    fill(conv)
    x = normal(3, 5, *size)
    expected = convolve(x, conv.weight.asnumpy().reshape(conv.shape), conv.bias.asnumpy(), stride, conv.padding)
    np.testing.assert_allclose(conv(Tensor(x)).asnumpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", TILE_POINTS)
def test_tiles_of_one_dimension(side):
    """A^T [(G g) (B^T d)] is the correlation of d with g (arXiv 1509.09308), and every number exact."""
    of_input, of_weight, of_output = tile_transforms(side)
    d, g = np.random.default_rng(0).standard_normal(side + 2), np.array([0.3, -1.2, 0.7])
    np.testing.assert_allclose(of_output @ ((of_weight @ g) * (of_input @ d)), np.correlate(d, g, "valid"))
    for matrix in (of_input, of_output):
        np.testing.assert_array_equal(np.kron(matrix, matrix).astype(np.float32), np.kron(matrix, matrix))


@pytest.mark.parametrize("tiles, weights", [(1 << 24, 1 << 25), (500, 1 << 25), (1 << 24, 3000)],
                         ids=["whole", "row blocks", "channel blocks"])
@pytest.mark.parametrize("size, side", [((28, 32), 4), ((30, 28), 2), ((31, 28), 0), ((6, 6), 0)])
def test_tiles_are_as_good_as_columns(monkeypatch, tiles, weights, size, side):
    monkeypatch.setattr(convolution, "TILE_ELEMENTS", tiles)
    monkeypatch.setattr(convolution, "WEIGHT_ELEMENTS", weights)
    conv = Conv2d(40, 7, 3, padding=1)
    fill(conv)
    x = normal(3, 40, *size)
    expected = convolve(x, conv.weight.asnumpy().reshape(conv.shape), conv.bias.asnumpy(), 1, conv.padding)
    assert conv.tiled and tile_side(x.shape) == side
    error = np.abs(conv(Tensor(x)).asnumpy() - expected).max() / np.abs(expected).max()
    assert error < 5e-6


def test_tiles_are_for_float32_with_many_channels_and_padding_1():
    half, bare, strided, single = (Conv2d(16, 6, 3, padding=1, dtype=ms.float16), Conv2d(16, 6, 3),
                                   Conv2d(16, 6, 3, 2, 1), Conv2d(16, 6, 1))
    for conv in (half, bare, strided, single, Conv2d(4, 6, 3, padding=1)):
        assert not conv.tiled


@pytest.mark.parametrize("size, side", [((6, 5), 0), ((16, 32), 4), ((18, 14), 2)])
def test_gradient_of_the_convolution(size, side):
    conv = Conv2d(16, 6, 3, padding=1)
    fill(conv)
    x, dy = Tensor(normal(2, 16, *size)), Tensor(normal(2, 6, *size))
    assert tile_side(x.shape) == side
    weights = ms.ParameterTuple([conv.weight])

    def native(x):
        return (conv.conv(x, conv.weight.reshape(conv.shape)) * dy).sum()

    def own(x):
        return (conv(x) * dy).sum()

    expected, ours = (ms.grad(loss, 0, weights)(x) for loss in (native, own))
    for a, b in ((ours[0], expected[0]), (ours[1][0], expected[1][0])):
        np.testing.assert_allclose(a.asnumpy(), b.asnumpy(), rtol=1e-4, atol=2e-6 * np.abs(b.asnumpy()).max() + 1e-4)


@pytest.mark.parametrize("size", [(6, 5), (16, 16)])
def test_layers_of_one_shape_share_functions_but_not_a_weight(size):
    pair, x = ms.nn.SequentialCell(Conv2d(16, 16, 3, padding=1), Conv2d(16, 16, 3, padding=1)), normal(2, 16, *size)
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        for _ in range(2):  # and a weight may change once the graph is there
            fill(pair)
            expected = x
            for conv in pair:
                weight = conv.weight.asnumpy().reshape(conv.shape)
                expected = convolve(expected, weight, conv.bias.asnumpy(), 1, conv.padding)
            np.testing.assert_allclose(pair(Tensor(x)).asnumpy(), expected, rtol=1e-4, atol=2e-3)
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)


@pytest.mark.parametrize("size", [(6, 5), (16, 16)])
def test_graph_mode_gives_the_same(size):
    conv = Conv2d(16, 6, 3, padding=1)
    fill(conv)
    x = Tensor(normal(2, 16, *size))
    expected = conv(x).asnumpy()
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        np.testing.assert_allclose(conv(x).asnumpy(), expected, rtol=1e-5, atol=1e-5)
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)
