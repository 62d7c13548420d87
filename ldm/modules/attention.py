"""Attention and the transformer blocks of the UNet.

`attend` is the only place that multiplies queries, keys and values; text encoders, image encoders, UNet and
autoencoder all call it.
"""
from __future__ import annotations

import math

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from ldm.device import on_ascend
from ldm.modules.layers import GroupNorm, LayerNorm, Linear, gelu, halves, linear
from ldm.modules.operators import (
    batch_matmul,
    batch_matmul_nt,
    in_turn,
    portions,
    repeated_like,
    shared,
    swap_inner,
    weighted_values,
)

# Largest score matrix held at a time where there is no fused operator, in elements (16 MiB of float32): it stays in a
# last cache of 32 MiB between products and softmax.
SCORE_ELEMENTS = 1 << 22
# Ascend's fused attention takes float16 and heads up to this size; the autoencoder's single head is 512 wide.
FUSED_HEAD_SIZE = 256


class Attention(nn.Cell):
    """softmax(q k^T / sqrt(d)) v over several heads.

    On Ascend in float16 it is the fused operator; elsewhere heads, and of large pictures queries, are taken in
    portions, so that the scores need no more than `SCORE_ELEMENTS`. Softmax runs in float32.

    Args:
        num_heads: heads h; the width must be a multiple of it.
    """

    def __init__(self, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.fused = on_ascend()

    def construct(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor = None) -> Tensor:
        """Attend.

        Args:
            q: (B, N, h * d) queries.
            k: (B, T, h * d) keys.
            v: (B, T, h * d) values.
            mask: (N, T) float32 added to the scores, or None.

        Returns:
            (B, N, h * d), dtype of q.
        """
        return attend(q, k, v, mask, self.num_heads, self.fused)


# Functions, not methods, for the time a graph takes to compile: all layers of equal shapes share them.


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, num_heads: int, fused: bool) -> Tensor:
    """What `Attention` gives; `fused` is whether there is such an operator."""
    q = q * (1.0 / math.sqrt(q.shape[-1] // num_heads))
    if fused and mask is None and q.dtype == mstype.float16 and q.shape[-1] <= FUSED_HEAD_SIZE * num_heads:
        return fused_attention(q, k, v, num_heads)
    return by_portions(q, k, v, mask, num_heads)


def by_portions(q: Tensor, k: Tensor, v: Tensor, mask, num_heads: int) -> Tensor:
    """What `Attention` gives for queries already scaled, from at most SCORE_ELEMENTS scores at a time."""
    together, rows, shape = _plan(q.shape, k.shape, num_heads, SCORE_ELEMENTS)
    whole, parts = q.shape, []
    q, k, v = _by_head(q, num_heads), _by_head(k, num_heads), _by_head(v, num_heads)
    if together == q.shape[0]:
        y = _by_queries(q, k, v, mask, rows)
    else:
        for a, b, c in zip(ops.split(q, together, 0), ops.split(k, together, 0), ops.split(v, together, 0)):
            parts.append(_by_queries(in_turn(a, parts), b, c, mask, rows))
        y = ops.concat(parts, 0)
    return swap_inner(y.reshape(shape)).reshape(whole)


@ops.constexpr
def _plan(q: tuple, k: tuple, num_heads: int, most: int) -> tuple:
    """How many heads of a batch are taken together; (first query, how many) of at most so many scores; and the output's
    shape by head."""
    groups, queries, tokens = q[0] * num_heads, q[1], k[1]
    together = min(groups, max(1, most // (queries * tokens)))
    while groups % together:
        together -= 1
    return (together, portions(queries, max(1, most // (together * tokens))),
            (q[0], num_heads, queries, q[2] // num_heads))


def _by_head(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, h * d) -> (B h, N, d)."""
    batch, count, _ = x.shape
    return swap_inner(x.reshape((batch, count, num_heads, -1))).reshape((batch * num_heads, count, -1))


def _by_queries(q: Tensor, k: Tensor, v: Tensor, mask, rows: tuple) -> Tensor:
    """The product of some heads, for some of their queries at a time."""
    if len(rows) == 1:
        return _product(q, k, v, mask)
    k, v, parts = k.contiguous(), v.contiguous(), []  # PyNative copies a view, slowly, whenever it is read
    for first, count in rows:
        masked = None if mask is None else ops.narrow(mask, 0, first, count)
        parts.append(_product(in_turn(ops.narrow(q, 1, first, count), parts), k, v, masked))
    return ops.concat(parts, 1)


def _product(q: Tensor, k: Tensor, v: Tensor, mask) -> Tensor:
    if mask is None:
        return weighted_values(q, k, v)[0]
    scores = batch_matmul_nt(q, k).astype(mstype.float32) + mask
    return batch_matmul(ops.softmax(scores, -1).astype(v.dtype), v)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """Ascend's fused attention on (B, N, h * d) with queries already scaled; head sizes are padded to a multiple of 16.

    Zero columns added to queries and keys leave every score as it is, those added to values are cut off again.
    """
    batch, queries, width = q.shape
    size = width // num_heads
    padded = -(-size // 16) * 16
    fold = []
    for x in (q, k, v):
        x = x.reshape((batch, x.shape[1], num_heads, size))
        if padded > size:
            x = ops.pad(x, (0, padded - size))
        fold.append(x.transpose((0, 2, 1, 3)))
    y = ops.flash_attention_score(fold[0], fold[1], fold[2], num_heads, scalar_value=1.0, input_layout="BNSD")
    return y[:, :, :, :size].transpose((0, 2, 1, 3)).reshape((batch, queries, width))


class CrossAttention(nn.Cell):
    """Queries from x, keys and values from the context (or from x itself).

    Args:
        query_dim: C, width of x and of the output.
        num_heads: heads.
        context_dim: D, width of the context; None for self-attention.
        dtype: of the weights.
    """

    def __init__(self, query_dim: int, num_heads: int, context_dim: int | None = None, dtype=mstype.float32):
        super().__init__()
        context_dim = context_dim or query_dim
        self.to_q = Linear(query_dim, query_dim, has_bias=False, dtype=dtype)
        self.to_k = Linear(context_dim, query_dim, has_bias=False, dtype=dtype)
        self.to_v = Linear(context_dim, query_dim, has_bias=False, dtype=dtype)
        self.to_out = nn.CellList([Linear(query_dim, query_dim, dtype=dtype)])
        self.attend = Attention(num_heads)
        self.inlined = on_ascend()

    def construct(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, N, C) and (B, T, D) -> (B, N, C)."""
        weights = self.to_q.weight, self.to_k.weight, self.to_v.weight, self.to_out[0].weight, self.to_out[0].bias
        return _cross_attention(self.inlined, (x, context), weights, self.attend.num_heads, self.attend.fused)


@shared
def _cross_attention(x: Tensor, context: Tensor, to_q: Tensor, to_k: Tensor, to_v: Tensor, to_out: Tensor,
                     bias: Tensor, num_heads: int, fused: bool) -> Tensor:
    y = attend(linear(x, to_q, None), linear(context, to_k, None), linear(context, to_v, None), None, num_heads, fused)
    return linear(y, to_out, bias)


class GEGLU(nn.Cell):
    """Half of a projection times the exact (erf) GELU of the other half."""

    def __init__(self, dim: int, inner: int, dtype=mstype.float32):
        super().__init__()
        self.proj = Linear(dim, 2 * inner, dtype=dtype)
        self.inlined = on_ascend()

    def construct(self, x: Tensor) -> Tensor:
        return _gated(self.inlined, (x,), (self.proj.weight, self.proj.bias))


@shared
def _gated(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y, gate = halves(x, weight, bias)
    return y * gelu(gate)


class FeedForward(nn.Cell):
    """GEGLU to four times the width and back. Index 1 of `net` is the dropout that published names count."""

    def __init__(self, dim: int, dtype=mstype.float32):
        super().__init__()
        self.net = nn.SequentialCell(GEGLU(dim, 4 * dim, dtype), nn.Identity(), Linear(4 * dim, dim, dtype=dtype))

    def construct(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class BasicTransformerBlock(nn.Cell):
    """Self-attention, attention to the context, feed-forward; each after a norm and added to its input.

    The context may be of a multiple of x's batch; then x is repeated after self-attention, which is made once.
    """

    def __init__(self, dim: int, num_heads: int, context_dim: int, dtype=mstype.float32):
        super().__init__()
        self.attn1 = CrossAttention(dim, num_heads, dtype=dtype)
        self.ff = FeedForward(dim, dtype)
        self.attn2 = CrossAttention(dim, num_heads, context_dim, dtype)
        self.norm1, self.norm2, self.norm3 = LayerNorm(dim), LayerNorm(dim), LayerNorm(dim)

    def construct(self, x: Tensor, context: Tensor) -> Tensor:
        y = self.norm1(x)
        x = repeated_like(self.attn1(y, y) + x, context)
        x = self.attn2(self.norm2(x), context) + x
        return self.ff(self.norm3(x)) + x


class SpatialTransformer(nn.Cell):
    """Transformer blocks over the pixels of a feature map, added to the map.

    Args:
        channels: C of the map.
        num_heads: heads.
        depth: how many blocks.
        context_dim: D of the context.
        use_linear: SDXL stores proj_in and proj_out as matrices, SD-1.5 as 1x1 convolutions; the product is the same.
        groups: of the norm.
        dtype: of the weights.
    """

    def __init__(self, channels: int, num_heads: int, depth: int, context_dim: int, use_linear: bool = False,
                 groups: int = 32, dtype=mstype.float32):
        super().__init__()
        self.norm = GroupNorm(channels, groups, epsilon=1e-6)
        self.proj_in = Linear(channels, channels, as_convolution=not use_linear, dtype=dtype)
        self.transformer_blocks = nn.CellList(
            [BasicTransformerBlock(channels, num_heads, context_dim, dtype) for _ in range(depth)])
        self.proj_out = Linear(channels, channels, as_convolution=not use_linear, dtype=dtype)

    def construct(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, C, H, W) and (B or n B, T, D) -> (B or n B, C, H, W)."""
        batch, channels, height, width = x.shape
        y = self.proj_in.from_maps(self.norm(x).reshape((batch, channels, height * width)))  # (B, N, C)
        for block in self.transformer_blocks:
            y = block(y, context)
        y = self.proj_out.to_maps(y).reshape((context.shape[0], channels, height, width))
        return y + repeated_like(x, y)
