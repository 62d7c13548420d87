"""What the frozen encoders make of a sample: it depends on the picture and the text alone, so it can be kept.

Features are float16, also when the networks run in float32: a run that keeps them and one that does not see the same.
"""
from __future__ import annotations

import functools
import hashlib
from typing import NamedTuple

import numpy as np
from mindspore import Tensor

from ip_adapter.data.stream import Batch, Draw, draws
from ip_adapter.weights.loading import ImagePromptModel
from ldm.model import Condition, LatentDiffusion


class Features(NamedTuple):
    """Features of a batch, float16 but for the sizes."""

    mean: np.ndarray  # (B, C, H / 8, W / 8) of the autoencoder's posterior, unscaled
    deviation: np.ndarray  # the same shape
    text: np.ndarray  # (B, T, D) text tokens
    pooled: np.ndarray  # (B, P) pooled text of SDXL; P is 0 for SD-1.5
    embedding: np.ndarray  # (B, E) image embedding
    sizes: np.ndarray  # (B, 6) int32, as in `Batch`


class FrozenEncoders:
    """Autoencoder, text and image encoder of a model, which training leaves as they are."""

    def __init__(self, model: ImagePromptModel):
        self.model = model
        self.empty_text = [part[0] for part in self.text([""])]

    def shapes(self, size: tuple) -> tuple:
        """Shapes of the features of one picture of (height, width) pixels, in the order of `Features`."""
        latent = (self.model.diffusion.vae.config.latent_channels, size[0] // 8, size[1] // 8)
        text, pooled = (part.shape for part in self.empty_text)
        return latent, latent, text, pooled, (self.model.embedder.image_encoder.config.embed_dim,), (6,)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of all that features depend on: weights and what is configured beside them, not of UNet or decoder."""
        vae = self.model.diffusion.vae
        digest = hashlib.sha256()
        for cell in (vae.encoder, vae.quant_conv, *self.model.diffusion.text_encoders,
                     self.model.embedder.image_encoder):
            digest.update(repr(getattr(cell, "config", None)).encode())
            for path, parameter in cell.parameters_and_names():
                digest.update(path.encode())
                digest.update(parameter.asnumpy())
        return digest.hexdigest()

    def text(self, texts: list) -> tuple:
        """B texts -> tokens (B, T, D) and pooled (B, P), float16."""
        context, pooled = self.model.diffusion.encode_text(texts)
        pooled = np.zeros((len(texts), 0)) if pooled is None else pooled.asnumpy()
        return context.asnumpy().astype(np.float16), pooled.astype(np.float16)

    def release(self, keep_vae: bool = False) -> None:
        """Give the memory of the encoders back; nothing but `empty_text` can be asked for after this."""
        if not keep_vae:  # validation pictures have to be decoded
            self.model.diffusion.vae = None
        self.model.release_encoders()

    def features(self, batch: Batch) -> Features:
        """Encode a batch."""
        moments = self.model.diffusion.vae.encode(Tensor(batch.pixels)).asnumpy()
        mean, log_variance = np.split(moments, 2, axis=1)
        deviation = np.exp(0.5 * np.clip(log_variance, -30.0, 20.0))
        embedding = self.model.embedder.image_encoder(Tensor(batch.clip_pixels)).asnumpy()
        return Features(mean.astype(np.float16), deviation.astype(np.float16), *self.text(batch.texts),
                        embedding.astype(np.float16), batch.sizes)

    def inputs(self, features: Features, positions: np.ndarray, seed: int, drops: tuple, p2_k: float = 0.0) -> tuple:
        """What `training_inputs` gives for samples at these places in the stream.

        Args:
            features: of B samples.
            positions: (B,) int64, their places.
            seed: of the training.
            drops: shares that lose the picture, the text, and both.
            p2_k: of the timesteps, see `NoiseSchedule.timestep_shares`.
        """
        shares = self.model.diffusion.schedule.timestep_shares(p2_k)
        drawn = [draws(seed, int(position), features.mean.shape[1:], *drops, shares) for position in positions]
        return training_inputs(features, drawn, self.empty_text, self.model.diffusion)


def training_inputs(features: Features, drawn: list[Draw], empty_text: list, diffusion: LatentDiffusion) -> tuple:
    """What `NoisePredictionLoss` takes, from features and the random numbers of each sample.

    Args:
        features: of B samples.
        drawn: B draws.
        empty_text: tokens (T, D) and pooled (P,) of the empty text, where the text is dropped. A dropped picture is a
            zero embedding.
        diffusion: the model, for its noise schedule and what it is told beside tokens.

    Returns:
        Noisy latents, timesteps, what to predict, text, vector (None for SD-1.5) and image embedding, float32 Tensors.
    """
    timesteps, noise, posterior, drop_image, drop_text = (np.stack(column) for column in zip(*drawn))
    latents = (features.mean + features.deviation * posterior) * np.float32(diffusion.scale_factor)
    noisy, target = (make(latents, noise, timesteps)
                     for make in (diffusion.schedule.add_noise, diffusion.schedule.target))
    text = np.where(drop_text[:, None, None], empty_text[0], features.text)
    embedding = np.where(drop_image[:, None], 0, features.embedding)
    noisy, timesteps, target, text, embedding = (
        Tensor(array.astype(np.float32)) for array in (noisy, timesteps, target, text, embedding))
    pooled = np.where(drop_text[:, None], empty_text[1], features.pooled).astype(np.float32)
    told = diffusion.tell_sizes(Condition(text, Tensor(pooled) if pooled.size else None), features.sizes)
    return noisy, timesteps, target, text, told.vector, embedding
