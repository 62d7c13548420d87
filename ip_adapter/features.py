"""What the frozen encoders make of a sample: it depends on the picture and the text alone, so it can be kept.

Features are float16, also when the networks run in float32: a run that keeps them and one that does not see the same.
"""
from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
from mindspore import Tensor

from ip_adapter.build import ImagePromptModel
from ip_adapter.dataset import Draw
from ldm.schedule import NoiseSchedule


class Features(NamedTuple):
    """Features of a batch, all float16."""

    mean: np.ndarray  # (B, C, H / 8, W / 8) of the autoencoder's posterior, unscaled
    deviation: np.ndarray  # the same shape
    text: np.ndarray  # (B, T, D) text tokens
    embedding: np.ndarray  # (B, E) image embedding


class FrozenEncoders:
    """Autoencoder, text and image encoder of a model, which training leaves as they are."""

    def __init__(self, model: ImagePromptModel):
        self.model = model
        self.empty_text = self.text([""])[0]

    def shapes(self, size: int) -> tuple:
        """Shapes of the features of one picture of `size` pixels, in the order of `Features`."""
        diffusion, image = self.model.diffusion, self.model.embedder.image_encoder.config
        latent = (diffusion.vae.config.latent_channels, size // 8, size // 8)
        text = diffusion.text_encoders[0].config
        return latent, latent, (text.context_length, text.width), (image.embed_dim,)

    def fingerprint(self) -> str:
        """sha256 of all weights that features depend on; the UNet and the decoder are not among them."""
        vae = self.model.diffusion.vae
        digest = hashlib.sha256()
        text, image = self.model.diffusion.text_encoders[0], self.model.embedder.image_encoder
        for cell in (vae.encoder, vae.quant_conv, text, image):
            for path, parameter in cell.parameters_and_names():
                digest.update(path.encode())
                digest.update(parameter.asnumpy())
        return digest.hexdigest()

    def text(self, texts: list) -> np.ndarray:
        """B texts -> (B, T, D) float16."""
        return self.model.diffusion.encode_text(texts).asnumpy().astype(np.float16)

    def release(self, keep_vae: bool = False) -> None:
        """Give the memory of the encoders back; nothing but `empty_text` can be asked for after this."""
        if not keep_vae:  # validation pictures have to be decoded
            self.model.diffusion.vae = None
        self.model.release_encoders()

    def features(self, pixels: np.ndarray, clip_pixels: np.ndarray, texts: list) -> Features:
        """Encode a batch.

        Args:
            pixels: (B, 3, H, W) float32 in [-1, 1].
            clip_pixels: (B, 3, 224, 224) float32 as CLIP takes them.
            texts: B captions.
        """
        moments = self.model.diffusion.vae.encode(Tensor(pixels)).asnumpy()
        mean, log_variance = np.split(moments, 2, axis=1)
        deviation = np.exp(0.5 * np.clip(log_variance, -30.0, 20.0))
        embedding = self.model.embedder.image_encoder(Tensor(clip_pixels)).asnumpy()
        return Features(mean.astype(np.float16), deviation.astype(np.float16), self.text(texts),
                        embedding.astype(np.float16))


def training_inputs(features: Features, drawn: list[Draw], empty_text: np.ndarray, schedule: NoiseSchedule,
                    scale_factor: float) -> tuple:
    """What `NoisePredictionLoss` takes, from features and the random numbers of each sample.

    Args:
        features: of B samples.
        drawn: B draws.
        empty_text: (T, D) tokens of the empty text, where the text is dropped. A dropped picture is a zero embedding.
        schedule: the noise schedule.
        scale_factor: what latents are multiplied by.

    Returns:
        Noisy latents, timesteps, noise, text and image embedding, float32 Tensors.
    """
    timesteps, noise, posterior, drop_image, drop_text = (np.stack(column) for column in zip(*drawn))
    latents = (features.mean + features.deviation * posterior) * np.float32(scale_factor)
    noisy = schedule.add_noise(latents, noise, timesteps)
    text = np.where(drop_text[:, None, None], empty_text, features.text)
    embedding = np.where(drop_image[:, None], 0, features.embedding)
    return tuple(Tensor(array.astype(np.float32)) for array in (noisy, timesteps, noise, text, embedding))
