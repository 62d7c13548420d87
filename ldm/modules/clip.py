"""CLIP's text and image transformers, one block for both; sizes and activation are values.

Tokenising is in `tokenizer.py`, resizing pictures in `ip_adapter/images/preprocess.py`.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.common.initializer import Normal, initializer

from ldm.modules.attention import Attention
from ldm.modules.convolution import Conv2d
from ldm.modules.layers import LayerNorm, Linear, gelu


@dataclass(frozen=True)
class CLIPTextConfig:
    """Sizes of a text encoder.

    Attributes:
        width: C of the hidden states.
        layers: transformer blocks.
        heads: attention heads.
        mlp_width: hidden width of the feed-forward.
        activation: "quick_gelu" (CLIP-L) or "gelu" (OpenCLIP, exact).
        projection: E of the pooled output, 0 for none.
        context_length: T, tokens of a text.
        vocab_size: entries of the vocabulary.
    """

    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    activation: str = "quick_gelu"
    projection: int = 0
    context_length: int = 77
    vocab_size: int = 49408


@dataclass(frozen=True)
class CLIPImageConfig:
    """Sizes of an image encoder (ViT-H/14 by default); `embed_dim` is E of the image embedding."""

    width: int = 1280
    layers: int = 32
    heads: int = 16
    mlp_width: int = 5120
    patch_size: int = 14
    image_size: int = 224
    embed_dim: int = 1024
    activation: str = "gelu"


class MultiheadAttention(nn.Cell):
    """Self-attention with one fused projection for queries, keys and values."""

    def __init__(self, width: int, heads: int, dtype):
        super().__init__()
        self.width = width
        self.in_proj = Linear(width, 3 * width, dtype=dtype)
        self.out_proj = Linear(width, width, dtype=dtype)
        self.attend = Attention(heads)

    def construct(self, x: Tensor, mask: Tensor = None) -> Tensor:
        q, k, v = ops.split(self.in_proj(x), self.width, -1)
        return self.out_proj(self.attend(q, k, v, mask))


class MLP(nn.Cell):
    """Feed-forward with `quick_gelu` (x sigmoid(1.702 x)) or the exact GELU."""

    def __init__(self, width: int, mlp_width: int, activation: str, dtype):
        super().__init__()
        assert activation in ("quick_gelu", "gelu"), activation
        self.quick = activation == "quick_gelu"
        self.c_fc, self.c_proj = Linear(width, mlp_width, dtype=dtype), Linear(mlp_width, width, dtype=dtype)

    def construct(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        x = x * ops.sigmoid(1.702 * x) if self.quick else gelu(x)
        return self.c_proj(x)


class ResidualAttentionBlock(nn.Cell):
    """Pre-norm attention and feed-forward."""

    def __init__(self, width: int, heads: int, mlp_width: int, activation: str, dtype):
        super().__init__()
        self.ln_1, self.ln_2 = LayerNorm(width), LayerNorm(width)
        self.attn = MultiheadAttention(width, heads, dtype)
        self.mlp = MLP(width, mlp_width, activation, dtype)

    def construct(self, x: Tensor, mask: Tensor = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Cell):
    """A stack of blocks that also gives the states before its last block."""

    def __init__(self, config, dtype):
        super().__init__()
        self.resblocks = nn.CellList([
            ResidualAttentionBlock(config.width, config.heads, config.mlp_width, config.activation, dtype)
            for _ in range(config.layers)])

    def construct(self, x: Tensor, mask: Tensor = None) -> tuple:
        before_last = x
        for block in self.resblocks:
            before_last = x
            x = block(x, mask)
        return x, before_last


class CLIPTextTransformer(nn.Cell):
    """Text encoder: causal transformer over token and position embeddings.

    Args:
        config: sizes.
        dtype: of weights and activations; norms and outputs are float32.
    """

    def __init__(self, config: CLIPTextConfig, dtype=mstype.float32):
        super().__init__()
        self.config, self.dtype = config, dtype
        self.token_embedding = Parameter(initializer(Normal(0.02), (config.vocab_size, config.width), dtype))
        self.positional_embedding = Parameter(initializer(Normal(0.01), (config.context_length, config.width), dtype))
        self.transformer = Transformer(config, dtype)
        self.ln_final = LayerNorm(config.width)
        self.text_projection = None
        if config.projection:
            self.text_projection = Parameter(
                initializer(Normal(config.width ** -0.5), (config.width, config.projection), dtype))
        length = config.context_length
        self.causal_mask = Tensor(np.triu(np.full((length, length), -np.inf, np.float32), 1))

    def construct(self, tokens: Tensor) -> tuple:
        """Encode.

        Args:
            tokens: (B, T) int32.

        Returns:
            last hidden states after the final norm (B, T, C); states before the last block, without that norm
            (B, T, C); pooled and projected state of the end token (B, E), or the unprojected one (B, C). All float32.
        """
        x = ops.gather(self.token_embedding, tokens, 0) + self.positional_embedding
        x, before_last = self.transformer(x, self.causal_mask)
        last = self.ln_final(x)
        # The end token has the highest id; the first one counts, for CLIP-L pads with it.
        pooled = ops.gather(last, ops.argmax(tokens, 1), 1, 1)
        if self.text_projection is not None:
            pooled = ops.matmul(pooled, self.text_projection)
        return last.astype(mstype.float32), before_last.astype(mstype.float32), pooled.astype(mstype.float32)


class CLIPImageTransformer(nn.Cell):
    """Image encoder: vision transformer whose class token, after the last norm and projection, is the embedding.

    Args:
        config: sizes.
        dtype: of weights and activations; norms and output are float32.
    """

    def __init__(self, config: CLIPImageConfig, dtype=mstype.float32):
        super().__init__()
        self.config, self.dtype = config, dtype
        tokens = (config.image_size // config.patch_size) ** 2 + 1
        scale = config.width ** -0.5
        self.class_embedding = Parameter(initializer(Normal(scale), (config.width,), dtype))
        self.positional_embedding = Parameter(initializer(Normal(scale), (tokens, config.width), dtype))
        self.conv1 = Conv2d(3, config.width, config.patch_size, config.patch_size, has_bias=False, dtype=dtype)
        self.ln_pre, self.ln_post = LayerNorm(config.width), LayerNorm(config.width)
        self.transformer = Transformer(config, dtype)
        self.proj = Parameter(initializer(Normal(scale), (config.width, config.embed_dim), dtype))

    def construct(self, image: Tensor) -> Tensor:
        """(B, 3, 224, 224) float32, normalised -> (B, E) float32."""
        x = self.conv1(image.astype(self.dtype))
        x = x.reshape((x.shape[0], x.shape[1], -1)).transpose((0, 2, 1))  # (B, patches, C)
        first = ops.broadcast_to(self.class_embedding, (x.shape[0], 1, x.shape[2]))
        x = ops.concat((first, x), 1) + self.positional_embedding
        x, _ = self.transformer(self.ln_pre(x))
        return ops.matmul(self.ln_post(x[:, 0]), self.proj).astype(mstype.float32)
