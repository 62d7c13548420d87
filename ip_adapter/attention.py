"""Decoupled cross-attention: the text attention of a UNet plus a second one over image tokens."""
from __future__ import annotations

from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from ldm.modules.attention import CrossAttention
from ldm.modules.layers import Linear


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
        self.num_tokens, self.dtype = num_tokens, dtype or attention.to_k.weight.dtype
        self.to_q, self.to_k, self.to_v = attention.to_q, attention.to_k, attention.to_v
        self.to_out, self.attend = attention.to_out, attention.attend
        dim, context_dim = attention.to_k.out_channels, attention.to_k.in_channels
        self.to_k_ip = Linear(context_dim, dim, has_bias=False, dtype=self.dtype)
        self.to_v_ip = Linear(context_dim, dim, has_bias=False, dtype=self.dtype)
        self.ip_scale = Parameter(Tensor(1.0, mstype.float32), requires_grad=False)

    def construct(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, N, C) and (B, T + K, D) -> (B, N, C)."""
        text, image = _text_and_image(context, self.num_tokens)
        q, image = self.to_q(x), image.astype(self.dtype)
        y = self.attend(q, self.to_k(text), self.to_v(text))
        y_ip = self.attend(q, self.to_k_ip(image).astype(q.dtype), self.to_v_ip(image).astype(q.dtype))
        return self.to_out[0](y + self.ip_scale.astype(y.dtype) * y_ip)


def _text_and_image(context: Tensor, num_tokens: int) -> tuple:
    """(B, T + K, D) -> (B, T, D) and (B, K, D); all layers share this function, and so a graph compiles faster."""
    return ops.split(context, (context.shape[1] - num_tokens, num_tokens), 1)
