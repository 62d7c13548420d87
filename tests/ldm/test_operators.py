"""Operators of our own, and their gradients, against MindSpore's."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

import ldm.modules.operators as operators
from ldm.modules.operators import BiasAdd, Compiled, WeightedValues, pad
from tests.conftest import normal


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


class Turned(nn.Cell):
    """Axes in one other order."""

    def __init__(self):
        super().__init__()
        self.transpose = Compiled(ops.transpose)

    def construct(self, x):
        return self.transpose(x, (3, 1, 0, 2))


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


@pytest.mark.parametrize("large", [1, 1000])  # compiled, and as a view
def test_transpose(monkeypatch, large):
    monkeypatch.setattr(operators, "LARGE", large)
    x, weights = normal(2, 3, 4, 5), normal(5, 3, 2, 4)
    np.testing.assert_array_equal(Turned()(Tensor(x)).asnumpy(), x.transpose(3, 1, 0, 2))
    gradient = ms.grad(Weighed(Turned(), Tensor(weights)))(Tensor(x))
    np.testing.assert_allclose(gradient.asnumpy(), weights.transpose(2, 1, 3, 0))


def test_padding():
    x = normal(2, 3, 4, 5)
    for padding in ((0, 0, 0, 0), (1, 2, 3, 4), (1, 0, 0, 2), (0, 3, 1, 0)):
        top, bottom, left, right = padding
        expected = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
        np.testing.assert_array_equal(pad(Tensor(x), padding).asnumpy(), expected)
