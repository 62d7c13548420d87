"""Projections, norms, resampling and attention against plain NumPy."""
from __future__ import annotations

import math

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

import ldm.modules.attention as attention
import ldm.modules.layers as layers
import ldm.modules.operators as operators
from ldm.modules.attention import GEGLU, Attention
from ldm.modules.convolution import Conv2d
from ldm.modules.layers import (
    GroupNorm,
    LayerNorm,
    Linear,
    Upsample,
    gelu,
    normed_conv,
    row_blocks,
    timestep_embedding,
)
from tests.support.arrays import fill, normal


@pytest.mark.parametrize("as_convolution", [False, True])
def test_linear(as_convolution):
    linear = Linear(6, 4, as_convolution=as_convolution)
    fill(linear)
    x = normal(2, 3, 6)
    maps = Tensor(x.transpose(0, 2, 1).copy())
    expected = x @ linear.weight.asnumpy().T + linear.bias.asnumpy()
    for y in (linear(Tensor(x)), linear.from_maps(maps)):
        np.testing.assert_allclose(y.asnumpy(), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(linear.to_maps(Tensor(x)).asnumpy(), expected.transpose(0, 2, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", [ms.GRAPH_MODE, ms.PYNATIVE_MODE])
@pytest.mark.parametrize("elements", [64 * 9 * 4, 64 * 9, 1])  # of a map of 2 x 64 x 7 x 9: two rows, less than one
@pytest.mark.parametrize("plain", [False, True])  # True: as on Ascend
def test_row_blocks_change_nothing(monkeypatch, elements, mode, plain):
    norm, conv, up = GroupNorm(64), Conv2d(64, 6, 3, padding=1), Upsample(64)
    norm.plain = plain
    for cell in (norm, conv, up.conv):
        fill(cell)
    x = Tensor(normal(2, 64, 7, 9) + 3)
    expected = normed_conv(norm, conv, x).asnumpy(), up(x, 14, 18).asnumpy()
    monkeypatch.setattr(layers, "MAP_ELEMENTS", elements)

    class Both(ms.nn.Cell):
        def __init__(self):
            super().__init__()
            self.norm, self.conv, self.up = norm, conv, up

        def construct(self, x):
            return normed_conv(self.norm, self.conv, x), self.up(x, 14, 18)

    ms.set_context(mode=mode)
    try:
        got = Both()(x)
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)
    for one, wanted in zip(got, expected):
        np.testing.assert_allclose(one.asnumpy(), wanted, rtol=1e-4, atol=3e-6 * np.abs(wanted).max())


def test_row_blocks_cover_every_row_once():
    for height, rows in ((7, 2), (6, 3), (5, 1), (4, 9)):
        blocks = row_blocks(height, rows)
        assert [row for first, count, _, _ in blocks for row in range(first, first + count)] == list(range(height))
        assert all((low, end) == (max(0, first - 1), min(height, first + rows + 1)) for first, _, low, end in blocks)


@pytest.mark.parametrize("large", [1, 1 << 18])  # by products, and by MindSpore's operators
def test_norms_run_in_float32_under_float16(monkeypatch, large):
    monkeypatch.setattr(operators, "LARGE", large)
    x = normal(2, 64, 5, 4) * 300  # the squares overflow float16
    group = GroupNorm(64)
    fill(group)
    grouped = x.reshape(2, 32, -1).astype(np.float64)
    scaled = (grouped - grouped.mean(-1, keepdims=True)) / np.sqrt(grouped.var(-1, keepdims=True) + 1e-5)
    gain, shift = (p.asnumpy().reshape(-1, 1, 1) for p in (group.gamma, group.beta))
    expected = scaled.reshape(x.shape) * gain + shift
    np.testing.assert_allclose(group(Tensor(x)).asnumpy(), expected, rtol=1e-4, atol=1e-4)
    half = group(Tensor(x, ms.float16))
    assert half.dtype == ms.float16
    np.testing.assert_allclose(half.asnumpy(), expected, atol=2e-2)
    layer, x = LayerNorm(5), normal(2, 3, 5) * 300
    fill(layer)
    scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    expected = scaled * layer.gamma.asnumpy() + layer.beta.asnumpy()
    np.testing.assert_allclose(layer(Tensor(x)).asnumpy(), expected, rtol=1e-4, atol=1e-4)
    half = layer(Tensor(x, ms.float16))
    assert half.dtype == ms.float16
    np.testing.assert_allclose(half.asnumpy(), expected, atol=2e-2)


def test_geglu_is_the_exact_gelu():
    geglu = GEGLU(1, 1)
    geglu.proj.weight.set_data(Tensor([[0.0], [1.0]], ms.float32))
    geglu.proj.bias.set_data(Tensor([1.0, 0.0], ms.float32))
    x = np.linspace(-6, 6, 201, dtype=np.float32)
    expected = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x.astype(np.float64)]
    np.testing.assert_allclose(geglu(Tensor(x.reshape(1, -1, 1))).asnumpy().reshape(-1), expected, atol=2e-6)


@pytest.mark.parametrize("size, target", [((3, 4), (6, 8)), ((3, 4), (5, 7)), ((5, 3), (9, 6))])
def test_upsample_takes_the_nearest_pixel(size, target):
    up = Upsample(2)
    up.conv = Conv2d(2, 2, 1, has_bias=False)
    up.conv.weight.set_data(Tensor(np.eye(2, dtype=np.float32)))
    x = normal(1, 2, *size)
    rows = np.arange(target[0]) * size[0] // target[0]
    columns = np.arange(target[1]) * size[1] // target[1]
    np.testing.assert_array_equal(up(Tensor(x), *target).asnumpy(), x[:, :, rows][:, :, :, columns])


def test_timestep_embedding():
    embedding = timestep_embedding(Tensor([0, 37], ms.int32), 8).asnumpy()
    np.testing.assert_allclose(embedding[0], [1, 1, 1, 1, 0, 0, 0, 0])
    angles = 37 * 10000.0 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(embedding[1], np.concatenate([np.cos(angles), np.sin(angles)]), atol=1e-5)


def attend_by_definition(q, k, v, heads, mask=0.0) -> np.ndarray:
    """softmax(q k^T / sqrt(d)) v, float64."""
    def split(x):
        return x.astype(np.float64).reshape(x.shape[0], x.shape[1], heads, -1).transpose(0, 2, 1, 3)
    q, k, v = split(q), split(k), split(v)
    scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(q.shape[-1]) + mask
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    y = weights / weights.sum(-1, keepdims=True) @ v
    return y.transpose(0, 2, 1, 3).reshape(y.shape[0], y.shape[2], -1)


@pytest.mark.parametrize("limit", [1 << 24, 200, 63, 30, 3])  # all heads at once, some, one by one, parts of one
def test_attention(monkeypatch, limit):
    monkeypatch.setattr(attention, "SCORE_ELEMENTS", limit)
    q, k, v = normal(2, 9, 12), normal(2, 7, 12), normal(2, 7, 12)
    y = Attention(3)(Tensor(q), Tensor(k), Tensor(v)).asnumpy()
    np.testing.assert_allclose(y, attend_by_definition(q, k, v, 3), rtol=1e-4, atol=1e-5)
    mask = normal(9, 7)
    y = Attention(3)(Tensor(q), Tensor(k), Tensor(v), Tensor(mask)).asnumpy()
    np.testing.assert_allclose(y, attend_by_definition(q, k, v, 3, mask), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", [ms.PYNATIVE_MODE, ms.GRAPH_MODE])
def test_gradients_of_attention_by_portions(monkeypatch, mode):
    q, k, v = (Tensor(normal(2, 9, 12)) for _ in range(3))
    gradients = []
    ms.set_context(mode=mode)
    try:
        for limit in (1 << 24, 30):  # all at once, parts of one head
            monkeypatch.setattr(attention, "SCORE_ELEMENTS", limit)
            gradients.append(ms.grad(Attention(3), (0, 1, 2))(q, k, v))
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)
    for whole, parts in zip(*gradients):
        np.testing.assert_allclose(parts.asnumpy(), whole.asnumpy(), rtol=1e-4, atol=1e-5)


def test_attention_with_a_mask():
    q = normal(1, 6, 8)
    mask = np.triu(np.full((6, 6), -np.inf, np.float32), 1)
    y = Attention(2)(Tensor(q), Tensor(q), Tensor(q), Tensor(mask)).asnumpy()
    np.testing.assert_allclose(y, attend_by_definition(q, q, q, 2, mask), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size, dtype, used", [
    (40, ms.float16, True), (48, ms.float16, True), (40, ms.float32, False), (512, ms.float16, False)])
def test_fused_attention(monkeypatch, size, dtype, used):
    """Ascend's operator, replaced by one of the same contract: float16, head sizes that are multiples of 16."""
    taken = []

    def operator(q, k, v, head_num, scalar_value, input_layout):
        assert input_layout == "BNSD" and q.shape[1] == head_num and q.dtype == k.dtype == v.dtype == ms.float16
        taken.append(q.shape[3])
        q, k, v = (x.asnumpy().transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1) for x in (q, k, v))
        y = attend_by_definition(q * math.sqrt(q.shape[2] // head_num) * scalar_value, k, v, head_num)
        return Tensor(y.reshape(y.shape[0], y.shape[1], head_num, -1).transpose(0, 2, 1, 3), ms.float16)

    monkeypatch.setattr(attention.ops, "flash_attention_score", operator)
    cell = Attention(2)
    cell.fused = True
    q, k, v = normal(2, 5, 2 * size), normal(2, 4, 2 * size), normal(2, 4, 2 * size)
    y = cell(Tensor(q, dtype), Tensor(k, dtype), Tensor(v, dtype))
    np.testing.assert_allclose(y.asnumpy(), attend_by_definition(q, k, v, 2), atol=2e-2)
    assert taken == ([48] if used else []) and y.dtype == dtype


def _gelu_sum(x):
    return gelu(x).sum()


@pytest.mark.parametrize("mode", [ms.GRAPH_MODE, ms.PYNATIVE_MODE])
def test_gelu_and_its_gradient(mode):
    """x Phi(x), and Phi(x) + x phi(x), by Python's own erf."""
    x = np.linspace(-6, 6, 97, dtype=np.float32)
    below = np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])
    ms.set_context(mode=mode)
    try:
        y, slope = gelu(Tensor(x)), ms.grad(_gelu_sum)(Tensor(x))
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)
    np.testing.assert_allclose(y.asnumpy(), x * below, atol=1e-6)
    np.testing.assert_allclose(slope.asnumpy(), below + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi), atol=1e-6)


@operators.shared
def _layer(x, weight, scale):
    return ops.erf(ops.MatMul(transpose_b=True)(x, weight)) * scale


class Layers(nn.Cell):
    """Three layers of equal shapes, each with a weight of its own."""

    def __init__(self, inlined: bool):
        super().__init__()
        self.inlined = inlined
        self.weights = ParameterTuple([Parameter(Tensor(normal(4, 4)), name=f"{n}.weight") for n in range(3)])

    def construct(self, x):
        for weight in self.weights:
            x = _layer(self.inlined, (x,), (weight,), 2.0)
        return x


@pytest.mark.parametrize("inlined, copies", [(False, 1), (True, 3)])
def test_a_graph_has_a_shared_layer_once(tmp_path, inlined, copies):
    """And follows its weights when they change."""
    layers, x = Layers(inlined), Tensor(normal(2, 4))
    ms.set_context(mode=ms.GRAPH_MODE, save_graphs=2, save_graphs_path=str(tmp_path))
    try:
        before = layers(x).asnumpy()
        layers.weights[1].set_data(Tensor(normal(4, 4)))
        after = layers(x).asnumpy()
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE, save_graphs=0)
    (graph,) = tmp_path.rglob("*_validate_*.ir")
    assert graph.read_text().count("PrimFunc_Erf(") == copies
    np.testing.assert_allclose(after, layers(x).asnumpy(), atol=1e-6)
    assert np.abs(after - before).max() > 0.1
