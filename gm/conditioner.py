"""What SDXL is told: tokens of two text encoders, and one vector of the pooled text and the picture's sizes."""
from __future__ import annotations

from dataclasses import astuple, dataclass

import numpy as np
from mindspore import Tensor, ops

from ldm.modules.clip import CLIPTextTransformer
from ldm.modules.layers import timestep_embedding
from ldm.modules.tokenizer import CLIPTokenizer

SIZE_CHANNELS = 256  # sinusoids of each of the six numbers


@dataclass(frozen=True)
class Sizes:
    """In pixels: what a picture measured before it was scaled and cropped, and what it measures now.

    Attributes:
        original: (height, width) before.
        crop: (top, left) of what was kept.
        target: (height, width) now.
    """

    original: tuple
    crop: tuple
    target: tuple

    def numbers(self) -> np.ndarray:
        """(6,) int64, in the order above."""
        return np.array(astuple(self), np.int64).ravel()


def sizes_embedding(sizes: np.ndarray) -> Tensor:
    """(B, 6) -> (B, 6 * 256) float32; arXiv 2307.01952, section 2.2."""
    return timestep_embedding(Tensor(sizes.astype(np.float32).ravel()), SIZE_CHANNELS).reshape((len(sizes), -1))


class Conditioner:
    """The text half of the condition.

    Args:
        text_encoders: CLIP-L and OpenCLIP's ViT-bigG, which pools.
    """

    def __init__(self, text_encoders: list[CLIPTextTransformer]):
        self.text_encoders = text_encoders
        length = text_encoders[0].config.context_length
        self.tokenizers = [CLIPTokenizer(context_length=length), CLIPTokenizer(context_length=length, pad_token=0)]

    def __call__(self, texts: list) -> tuple:
        """B texts -> (B, 77, D) states before the last layer of both, side by side, and (B, E) pooled; float32."""
        states = [encoder(Tensor(tokenizer(texts)))[1:]
                  for encoder, tokenizer in zip(self.text_encoders, self.tokenizers)]
        return ops.concat([before_last for before_last, _ in states], -1), states[-1][1]
