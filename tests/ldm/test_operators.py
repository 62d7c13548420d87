"""Operators of our own, and their gradients, against MindSpore's."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from ldm.modules.operators import (
    BiasAdd,
    Reordered,
    WeightedValues,
    add_to_maps,
    group_norm,
    layer_norm,
    pad,
)
from tests.support.arrays import normal


class Weighed(nn.Cell):
    """A sum of an operator's first output with fixed weights."""

    def __init__(self, operator, weights):
        super().__init__()
        self.operator, self.weights = operator, weights

    def construct(self, *inputs):
        out = self.operator(*inputs)
        return ((out[0] if isinstance(out, tuple) else out) * self.weights).sum()


class Plain(nn.Cell):
    """Attention of plain operators."""

    def construct(self, q, k, v):
        return ops.BatchMatMul()(ops.softmax(ops.BatchMatMul(transpose_b=True)(q, k), -1), v)


class Normalised(nn.Cell):
    """A norm by MindSpore's own operator."""

    def construct(self, x, gamma, beta):
        if x.ndim == 4:
            return ops.group_norm(x, 3, gamma.reshape((-1,)), beta.reshape((-1,)), 1e-3)
        return ops.LayerNorm(epsilon=1e-3)(x, gamma.reshape((-1,)), beta.reshape((-1,)))[0]


class NormalisedByProducts(nn.Cell):
    """The same by ours."""

    def construct(self, x, gamma, beta):
        return group_norm(x, gamma, beta, 3, 1e-3) if x.ndim == 4 else layer_norm(x, gamma, beta, 1e-3)


class Raised(nn.Cell):
    """Maps with a value added to each: ours, and as MindSpore does it."""

    def __init__(self, own: bool):
        super().__init__()
        self.own = own

    def construct(self, x, values):
        return add_to_maps(x, values) if self.own else x + values.reshape(values.shape + (1, 1))


@pytest.fixture(params=[ms.GRAPH_MODE, ms.PYNATIVE_MODE], autouse=True)
def mode(request):
    ms.set_context(mode=request.param)
    yield
    ms.set_context(mode=ms.PYNATIVE_MODE)


def assert_same_gradients(own, plain, inputs, shape):
    weights = Tensor(normal(*shape))
    places = tuple(range(len(inputs)))
    got, expected = (ms.grad(Weighed(operator, weights), places)(*inputs) for operator in (own, plain))
    for a, b in zip(got, expected):
        assert a.shape == b.shape
        np.testing.assert_allclose(a.asnumpy(), b.asnumpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 5), (3, 5, 4, 2)])
def test_bias(shape):
    assert_same_gradients(BiasAdd(), ops.BiasAdd(), (Tensor(normal(*shape)), Tensor(normal(5))), shape)


def test_weighted_values():
    q, k, v = (Tensor(normal(4, count, 8)) for count in (7, 9, 9))
    np.testing.assert_allclose(WeightedValues()(q, k, v)[0].asnumpy(), Plain()(q, k, v).asnumpy(), rtol=1e-5, atol=1e-5)
    assert_same_gradients(WeightedValues(), Plain(), (q, k, v), (4, 7, 8))


def test_weighted_values_in_float16():
    q, k, v = (Tensor(normal(2, count, 8), ms.float16) for count in (7, 9, 9))
    y, weights = WeightedValues()(q, k, v)
    assert y.dtype == ms.float16 and weights.dtype == ms.float32
    gradients = ms.grad(Weighed(WeightedValues(), Tensor(normal(2, 7, 8), ms.float16)), (0, 1, 2))(q, k, v)
    assert all(gradient.dtype == ms.float16 and np.isfinite(gradient.asnumpy()).all() for gradient in gradients)


@pytest.mark.parametrize("axes", [(2, 1, 0, 3), (1, 0, 2, 3), (0, 2, 1, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 3, 1, 5)])
def test_reordered(shape, axes):
    x = normal(*shape)
    expected = x.transpose(axes)
    np.testing.assert_array_equal(Reordered(axes)(Tensor(x)).asnumpy(), expected)
    weights = normal(*expected.shape)
    gradient = ms.grad(Weighed(Reordered(axes), Tensor(weights)))(Tensor(x))
    np.testing.assert_array_equal(gradient.asnumpy(), weights.transpose(np.argsort(axes)))


@pytest.mark.parametrize("shape", [(7, 6), (2, 6, 5, 4)])
def test_norms(shape):
    """Also of rows far from zero, whose variance is not the difference of two large numbers."""
    inputs = Tensor(normal(*shape) + 100), Tensor(normal(1, 6)), Tensor(normal(1, 6))
    got, expected = (norm(*inputs).asnumpy() for norm in (NormalisedByProducts(), Normalised()))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    assert_same_gradients(NormalisedByProducts(), Normalised(), (Tensor(normal(*shape)), *inputs[1:]), shape)


def test_values_added_to_maps():
    x, values = normal(2, 3, 4, 5), normal(2, 3)
    np.testing.assert_array_equal(Raised(True)(Tensor(x), Tensor(values)).asnumpy(), x + values[..., None, None])
    assert_same_gradients(Raised(True), Raised(False), (Tensor(x), Tensor(values)), x.shape)


def test_padding():
    x = normal(2, 3, 4, 5)
    for padding in ((0, 0, 0, 0), (1, 2, 3, 4), (1, 0, 0, 2), (0, 3, 1, 0)):
        top, bottom, left, right = padding
        expected = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
        np.testing.assert_array_equal(pad(Tensor(x), padding).asnumpy(), expected)
