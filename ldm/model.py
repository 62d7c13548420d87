"""Stable Diffusion 1.5 put together: text to context, pictures to latents and back, guided denoising."""
from __future__ import annotations

from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from ldm.modules.autoencoder import AutoencoderKL
from ldm.modules.clip import CLIPTextTransformer
from ldm.modules.tokenizer import CLIPTokenizer
from ldm.modules.unet import UNetModel


class GuidedDenoiser(nn.Cell):
    """Classifier-free guidance in one batch: u + s (c - u).

    Prompts, timestep and guidance scale are inputs, so one compiled graph serves them all.
    """

    def __init__(self, unet: UNetModel):
        super().__init__(auto_prefix=False)
        self.unet = unet

    def construct(self, x: Tensor, timestep: Tensor, context: Tensor, scale: Tensor) -> Tensor:
        """Predict the noise.

        Args:
            x: (B, 4, H, W) float32 latents.
            timestep: () float32.
            context: (B, T, D), or (2 B, T, D) with the unconditional half first.
            scale: () float32, guidance scale; of no effect on a context of B.

        Returns:
            (B, 4, H, W) float32.
        """
        guided = context.shape[0] == 2 * x.shape[0]
        batch = ops.concat((x, x), 0) if guided else x
        noise = self.unet(batch, ops.broadcast_to(timestep, (batch.shape[0],)), context)
        if guided:
            uncond, cond = ops.split(noise, x.shape[0], 0)
            noise = uncond + scale * (cond - uncond)
        return noise


@dataclass
class LatentDiffusion:
    """The parts of a model and what joins them.

    Attributes:
        unet: predicts noise; patched with image attention or not.
        vae: autoencoder.
        text_encoder: CLIP-L.
        scale_factor: what latents are multiplied by (0.18215).
    """

    unet: UNetModel
    vae: AutoencoderKL
    text_encoder: CLIPTextTransformer
    scale_factor: float

    def __post_init__(self):
        self.tokenizer = CLIPTokenizer(context_length=self.text_encoder.config.context_length)
        self.guided = GuidedDenoiser(self.unet)

    def encode_text(self, texts: list) -> Tensor:
        """Texts -> (B, 77, D) float32 context: last hidden states after the final norm."""
        return self.text_encoder(Tensor(self.tokenizer(texts)))[0]

    def encode_image(self, image: np.ndarray) -> Tensor:
        """(B, 3, H, W) float32 in [-1, 1] -> (B, 4, H / 8, W / 8) scaled latents, the mode of the posterior."""
        moments = self.vae.encode(Tensor(image))
        return ops.split(moments, moments.shape[1] // 2, 1)[0] * self.scale_factor

    def decode(self, latents: Tensor) -> np.ndarray:
        """(B, 4, h, w) scaled latents -> (B, 8 h, 8 w, 3) uint8 RGB, one picture at a time to bound memory."""
        pictures = []
        for latent in latents.asnumpy():
            image = self.vae(Tensor(latent[None] / np.float32(self.scale_factor))).asnumpy()[0]
            pixels = np.clip(image.transpose(1, 2, 0) / 2 + 0.5, 0, 1) * 255
            pictures.append(np.round(pixels).astype(np.uint8))
        return np.stack(pictures)

    def denoiser(self, cond: Tensor, uncond: Tensor, guidance_scale: float):
        """The function a sampler calls.

        Args:
            cond: (B, T, D) context.
            uncond: (B, T, D) context of the unconditional side.
            guidance_scale: s; 1 or less leaves the unconditional side out.

        Returns:
            (x, t) -> predicted noise, shaped as x.
        """
        context = ops.concat((uncond, cond), 0) if guidance_scale > 1 else cond
        scale = Tensor(guidance_scale, ms.float32)
        return lambda x, t: self.guided(x, Tensor(t, ms.float32), context, scale)
