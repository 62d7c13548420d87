"""How alike pictures, or pictures and texts, are to CLIP: the two measures of the IP-Adapter paper's table 1."""
from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
from mindspore import Tensor, ops
from mindspore.nn.utils import no_init_parameters
from PIL import Image

from ip_adapter.images.preprocess import clip_pixels
from ip_adapter.names import IMAGE_ENCODER_TORCH
from ip_adapter.weights.loading import ImagePromptModel
from ldm.checkpoints.architecture import image_config, text_config
from ldm.checkpoints.file import CheckpointError, open_checkpoint
from ldm.checkpoints.loading import Part, View, check, load, parameter_shapes
from ldm.checkpoints.names import CLIP_TEXT_TORCH
from ldm.modules.clip import CLIPImageTransformer, CLIPTextTransformer
from ldm.modules.tokenizer import CLIPTokenizer

CLIP_SCORE_WEIGHT = 2.5  # arXiv 2104.08718, eq. 1


class ClipScorer:
    """Compares by the cosine of embeddings.

    Args:
        image_encoder: pictures to embeddings.
        text_encoder: texts to embeddings of the same space; None if there is none, then texts cannot be compared.
        tokenizer: of the text encoder.
    """

    def __init__(self, image_encoder: CLIPImageTransformer, text_encoder: CLIPTextTransformer | None,
                 tokenizer: CLIPTokenizer | None):
        self.image_encoder, self.text_encoder, self.tokenizer = image_encoder, text_encoder, tokenizer

    def images(self, pictures: list[Image.Image]) -> np.ndarray:
        """B pictures of any size -> (B, E) float32 of unit length."""
        size = self.image_encoder.config.image_size
        pixels = np.stack([clip_pixels(picture, size) for picture in pictures])
        return _unit(self.image_encoder(Tensor(pixels)))

    def clip_i(self, pictures: np.ndarray, prompt: Image.Image) -> float:
        """Mean cosine of (B, H, W, 3) uint8 pictures and the picture they were made from."""
        return float((self.images([Image.fromarray(p) for p in pictures]) @ self.images([prompt])[0]).mean())

    def clip_t(self, pictures: np.ndarray, text: str) -> float | None:
        """CLIPScore of (B, H, W, 3) uint8 pictures and the caption of the picture prompt; None without a text encoder.

        Source:
            arXiv 2104.08718, eq. 1.
        """
        if self.text_encoder is None:
            return None
        embedding = _unit(self.text_encoder(Tensor(self.tokenizer([text])))[2])[0]
        cosines = self.images([Image.fromarray(p) for p in pictures]) @ embedding
        return float(CLIP_SCORE_WEIGHT * np.maximum(cosines, 0).mean())


def own_scorer(model: ImagePromptModel) -> ClipScorer:
    """A scorer from the encoders of a model.

    Texts can be compared where a text encoder shares its space with the image encoder: those of the demo models, and
    SDXL's second one with an image encoder of the same CLIP. SD-1.5's belongs to another CLIP than its image encoder.
    """
    image = model.embedder.image_encoder
    together = [pair for pair in zip(model.diffusion.text_encoders, model.diffusion.tokenizers)
                if (pair[0].config.projection or pair[0].config.width) == image.config.embed_dim]
    return ClipScorer(image, *(together[-1] if together else (None, None)))


def open_scorer(path: Path, activation: str) -> ClipScorer:
    """A scorer from a whole CLIP in Hugging Face's layout, such as openai/clip-vit-large-patch14.

    Args:
        path: .safetensors or .bin.
        activation: "quick_gelu" (OpenAI's) or "gelu" (OpenCLIP's).

    Raises:
        CheckpointError: it is not a whole CLIP.
    """
    with ExitStack() as stack:
        file = stack.enter_context(open_checkpoint(path))
        views = View(file.tensors, IMAGE_ENCODER_TORCH), View(file.tensors, CLIP_TEXT_TORCH)
        image_size, text_size = image_config(views[0], activation=activation), text_config(views[1], activation)
        if image_size is None or text_size is None or not text_size.projection:
            raise CheckpointError(f"--clip {path}: holds no whole CLIP; expected image and text encoder with their "
                                  "projections, such as openai/clip-vit-large-patch14's model.safetensors")
        with no_init_parameters():
            image, text = CLIPImageTransformer(image_size), CLIPTextTransformer(text_size)
        parts = [Part(parameter_shapes(image), file, IMAGE_ENCODER_TORCH),
                 Part(parameter_shapes(text), file, CLIP_TEXT_TORCH)]
        check(parts, allowed=r"^logit_scale$")
        for cell, part in zip((image, text), parts):
            load(cell, part)
            cell.set_train(False)
    return ClipScorer(image, text, CLIPTokenizer(context_length=text_size.context_length))


def _unit(embedding: Tensor) -> np.ndarray:
    return (embedding / ops.sqrt(ops.square(embedding).sum(-1, keepdims=True))).asnumpy()
