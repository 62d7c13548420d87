"""Decoupled cross-attention: the text attention of a UNet plus a second one over image tokens."""
from __future__ import annotations

from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from ldm.modules.attention import CrossAttention, attend
from ldm.modules.layers import Linear, linear
from ldm.modules.operators import shared


class IPAdapterCrossAttention(nn.Cell):
    """out = attn(q, k_text, v_text) + ip_scale attn(q, k_ip, v_ip), then the output projection.

    Built from an existing text attention, whose layers it shares. `ip_scale` is a parameter outside every
    checkpoint, so that changing it needs no recompilation.

    Args:
        attention: the text attention it takes the place of.
        num_tokens: K, image tokens at the end of the context.
        dtype: of the weights it adds; that of the text attention if None. To train them they are float32.

    Source:
        IP-Adapter (arXiv 2308.06721), eq. 5.
    """

    def __init__(self, attention: CrossAttention, num_tokens: int, dtype=None):
        super().__init__()
        self.num_tokens, dtype = num_tokens, dtype or attention.to_k.weight.dtype
        self.to_q, self.to_k, self.to_v = attention.to_q, attention.to_k, attention.to_v
        self.to_out, self.attend, self.inlined = attention.to_out, attention.attend, attention.inlined
        dim, context_dim = attention.to_k.out_channels, attention.to_k.in_channels
        self.to_k_ip = Linear(context_dim, dim, has_bias=False, dtype=dtype)
        self.to_v_ip = Linear(context_dim, dim, has_bias=False, dtype=dtype)
        self.ip_scale = Parameter(Tensor(1.0, mstype.float32), requires_grad=False)

    def construct(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, N, C) and (B, T + K, D) -> (B, N, C)."""
        weights = (self.to_q.weight, self.to_k.weight, self.to_v.weight, self.to_k_ip.weight, self.to_v_ip.weight,
                   self.ip_scale, self.to_out[0].weight, self.to_out[0].bias)
        return _decoupled(self.inlined, (x, context), weights, self.num_tokens, self.attend.num_heads,
                          self.attend.fused)


@shared
def _decoupled(x: Tensor, context: Tensor, to_q: Tensor, to_k: Tensor, to_v: Tensor, to_k_ip: Tensor, to_v_ip: Tensor,
               ip_scale: Tensor, to_out: Tensor, bias: Tensor, num_tokens: int, num_heads: int, fused: bool) -> Tensor:
    text, image = ops.split(context, (context.shape[1] - num_tokens, num_tokens), 1)
    q, image = linear(x, to_q, None), image.astype(to_k_ip.dtype)
    k_ip, v_ip = linear(image, to_k_ip, None).astype(q.dtype), linear(image, to_v_ip, None).astype(q.dtype)
    y = attend(q, linear(text, to_k, None), linear(text, to_v, None), None, num_heads, fused)
    y_ip = attend(q, k_ip, v_ip, None, num_heads, fused)
    return linear(y + ip_scale.astype(y.dtype) * y_ip, to_out, bias)
