"""From a picture to image tokens."""
from __future__ import annotations

from typing import NamedTuple

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from ldm.checkpoints.loading import View
from ldm.modules.clip import CLIPImageTransformer
from ldm.modules.layers import LayerNorm, Linear


class ImageProjConfig(NamedTuple):
    """Sizes of a projector: E of the image embedding, D of the context, K tokens."""

    embed_dim: int = 1024
    context_dim: int = 768
    num_tokens: int = 4


def image_proj_config(view: View) -> ImageProjConfig | None:
    """Sizes of the projector in `view`; None if there is none of the plain kind."""
    weight, norm = view.shape("proj.weight", 2), view.shape("norm.gamma", 1)
    if weight is None or norm is None or weight[0] % norm[0]:
        return None
    return ImageProjConfig(weight[1], norm[0], weight[0] // norm[0])


class ImageProjModel(nn.Cell):
    """One image embedding to K context tokens: a linear layer, reshaped and normalised.

    Source:
        tencent-ailab/IP-Adapter: ip_adapter/ip_adapter.py.
    """

    def __init__(self, config: ImageProjConfig, dtype=mstype.float32):
        super().__init__()
        self.config, self.dtype = config, dtype
        self.proj = Linear(config.embed_dim, config.num_tokens * config.context_dim, dtype=dtype)
        self.norm = LayerNorm(config.context_dim)

    def construct(self, embedding: Tensor) -> Tensor:
        """(B, E) -> (B, K, D) float32."""
        tokens = self.proj(embedding.astype(self.dtype))
        tokens = tokens.reshape((-1, self.config.num_tokens, self.config.context_dim))
        return self.norm(tokens).astype(mstype.float32)


def start_image_proj(model: ImageProjModel, seed: int = 0) -> None:
    """Give a new projector its first weights: normal with deviation 1 / sqrt(E), zero biases, unit gains."""
    rng = np.random.default_rng(seed)
    shape = model.proj.weight.shape
    weight = rng.standard_normal(shape, np.float32) * np.float32(shape[1] ** -0.5)
    for parameter, value in ((model.proj.weight, weight), (model.proj.bias, np.zeros(shape[0])),
                             (model.norm.gamma, np.ones(model.norm.gamma.shape)),
                             (model.norm.beta, np.zeros(model.norm.beta.shape))):
        parameter.set_data(Tensor(value, parameter.dtype))


class IPAdapterImageEmbedder:
    """Image encoder and projector: pixels to image tokens for both sides of the guidance."""

    def __init__(self, image_encoder: CLIPImageTransformer, image_proj: ImageProjModel):
        self.image_encoder, self.image_proj = image_encoder, image_proj

    def project(self, embedding: Tensor) -> tuple:
        """(B, E) image embeddings -> tokens and unconditional tokens, (B, K, D) float32 each.

        The unconditional side is the projection of a zero embedding, not zero tokens and not a black picture.
        """
        return self.image_proj(embedding), self.image_proj(ops.zeros_like(embedding))
