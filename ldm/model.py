"""Stable Diffusion 1.5 put together: text to context, pictures to latents and back, guided denoising."""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable, Iterable, NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from ldm.device import finished
from ldm.errors import UserError
from ldm.modules.autoencoder import AutoencoderKL
from ldm.modules.clip import CLIPTextTransformer
from ldm.modules.controlnet import ControlNet
from ldm.modules.operators import repeated_like
from ldm.modules.tokenizer import CLIPTokenizer
from ldm.modules.unet import UNetModel
from ldm.sampling.ddim import sample_ddim
from ldm.sampling.schedule import NoiseSchedule, leading_timesteps


class GuidedDenoiser(nn.Cell):
    """Classifier-free guidance in one batch: u + s (c - u), with ControlNets or without.

    Prompts, timestep, hints and scales are inputs, so one compiled graph serves them all; another one does what is left
    where deep features are kept.
    """

    def __init__(self, unet: UNetModel, controlnets: list = ()):
        super().__init__(auto_prefix=False)
        self.unet, self.controlnets = unet, nn.CellList(list(controlnets))

    def construct(self, x: Tensor, timestep: Tensor, context: Tensor, scale: Tensor, y: Tensor = None,
                  text: Tensor = None, hints: Tensor = None, control_scales: Tensor = None, deep: Tensor = None,
                  residual: Tensor = None) -> tuple:
        """Predict what the network was trained to (`NoiseSchedule.prediction`).

        Args:
            x: (B, 4, H, W) float32 latents.
            timestep: () float32.
            context: (B, T, D), or (2 B, T, D) with the unconditional half first.
            scale: () float32, guidance scale; of no effect on a context of B.
            y: (B, V) or (2 B, V) vector condition of SDXL, or None.
            text: the part of `context` that ControlNets see, or None for none of them.
            hints: (N, M, H, W) embedded hint of each ControlNet.
            control_scales: (N,) float32.
            deep: features of an earlier step, B or 2 B as the context, to use in place of new ones; None to make them.
            residual: what belongs to them, of B or 2 B as well.

        Returns:
            (B, 4, H, W) float32, and what later steps may be given: deep features, and the ControlNets' residual beside
            them, or () zero without.
        """
        guided = context.shape[0] == 2 * x.shape[0]
        # Without a vector condition both halves are the same until the context comes in, and the UNet makes them once.
        batch = x if y is None else repeated_like(x, context)
        timesteps = ops.broadcast_to(timestep, (batch.shape[0],))
        emb = self.unet.embed(timesteps, y)
        if deep is None:
            control, residual = None, Tensor(0.0, ms.float32)
            if text is not None:
                control = self._residuals(batch, timesteps, text, hints, control_scales, y)
                residual = control[0]
            deep, skip = self.unet.features(batch, emb, context, control)
        else:
            skip = self.unet.first_skip(batch) + residual.astype(deep.dtype)
        predicted = self.unet.last_block(deep, skip, emb, context)
        if guided:
            uncond, cond = ops.split(predicted, x.shape[0], 0)
            predicted = uncond + scale * (cond - uncond)
        return predicted, deep, residual

    def _residuals(self, x: Tensor, timesteps: Tensor, text: Tensor, hints: Tensor, scales: Tensor, y) -> list:
        """The sum of what the ControlNets give."""
        total = None
        for i in range(len(self.controlnets)):
            residuals = self.controlnets[i](x, timesteps, text, hints[i : i + 1], scales[i], y)
            total = residuals if total is None else [a + b for a, b in zip(total, residuals)]
        return total


class Condition(NamedTuple):
    """What one side of the guidance is given."""

    context: Tensor  # (B, T, D) float32: text tokens, then image tokens
    vector: Tensor | None = None  # (B, V) float32 of SDXL

    def repeated(self, count: int) -> Condition:
        """A condition of one picture for `count` of them."""
        return Condition(*(None if part is None else ops.broadcast_to(part, (count,) + part.shape[1:])
                           for part in self))


@dataclass
class Control:
    """What one ControlNet is told.

    Attributes:
        hint: (1, M, H / 8, W / 8) float32, from `ControlNet.embed_hint`.
        scale: what its residuals are multiplied by.
        timesteps: the timesteps at which it acts.
    """

    hint: Tensor
    scale: float
    timesteps: set


@dataclass(frozen=True)
class Shortcuts:
    """Work that is left out at some timesteps. By default none is, for the picture changes a little.

    Attributes:
        unguided: without the unconditional side; arXiv 2404.07724.
        shallow: with the deep features of the last timestep that was not among them; arXiv 2312.00858.
    """

    unguided: frozenset = frozenset()
    shallow: frozenset = frozenset()


@dataclass
class LatentDiffusion:
    """The parts of a model and what joins them.

    Attributes:
        unet: predicts noise or velocity; patched with image attention or not.
        vae: autoencoder.
        text_encoders: CLIP-L; of SDXL, OpenCLIP's ViT-bigG as well.
        schedule: the noise it was trained with, and what it predicts.
        scale_factor: what latents are multiplied by (0.18215).
        controlnets: in the order of the hints.
    """

    unet: UNetModel
    vae: AutoencoderKL
    text_encoders: list[CLIPTextTransformer]
    schedule: NoiseSchedule
    scale_factor: float
    controlnets: list[ControlNet] = field(default_factory=list)

    def __post_init__(self):
        self.context_length = self.text_encoders[0].config.context_length  # the encoder itself may leave memory
        self.tokenizers = [CLIPTokenizer(context_length=self.context_length)]
        self.guided, self.decoder = GuidedDenoiser(self.unet, self.controlnets), None  # None: the autoencoder as it is

    def compile(self) -> None:
        """From now on denoiser and decoder run as graphs, also where all else runs operator by operator.

        Their Parameters, the scale of the image attention among them, keep the values of the first call.
        """
        self.guided, self.decoder = ms.jit(self.guided), ms.jit(self.vae)

    def encode_text(self, texts: list) -> Condition:
        """B texts -> their tokens, the last hidden states after the final norm."""
        return Condition(self.text_encoders[0](Tensor(self.tokenizers[0](texts)))[0])

    def tell_sizes(self, text: Condition, sizes: np.ndarray) -> Condition:
        """What B texts ask for in pictures of (B, 6) `sizes`, which SD-1.5 is not told; see `gm.conditioner.Sizes`."""
        return text

    def set_size(self, height: int, width: int) -> None:
        """Of the pictures that `condition` is to ask for, in pixels."""

    def condition(self, texts: list) -> Condition:
        """What B texts alone ask for."""
        return self.encode_text(texts)

    def encode_image(self, image: np.ndarray) -> Tensor:
        """(B, 3, H, W) float32 in [-1, 1] -> (B, 4, H / 8, W / 8) scaled latents, the mode of the posterior."""
        moments = self.vae.encode(Tensor(image))
        return ops.split(moments, moments.shape[1] // 2, 1)[0] * self.scale_factor

    def decode(self, latents: Tensor) -> np.ndarray:
        """(B, 4, h, w) scaled latents -> (B, 8 h, 8 w, 3) uint8 RGB, one picture at a time to bound memory.

        Raises:
            UserError: an image is not finite.
        """
        pictures, decoder = [], self.decoder or self.vae
        for latent in latents.asnumpy():
            image = decoder(Tensor(latent[None] / np.float32(self.scale_factor))).asnumpy()[0]
            if not np.isfinite(image).all():
                raise UserError("the model made NaN or infinite values instead of an image; in float16 they overflow, "
                                "so try `dtype` float32, else look for damaged weights or extreme scales")
            pixels = np.clip(image.transpose(1, 2, 0) / 2 + 0.5, 0, 1) * 255
            pictures.append(np.round(pixels).astype(np.uint8))
        return np.stack(pictures)

    def timesteps(self, steps: int) -> np.ndarray:
        """(S,) at which the network is asked by `sample`."""
        return leading_timesteps(steps)

    def levels(self, steps: int) -> np.ndarray:
        """The noise levels of `sample` as its `denoise` is told them; the first S are asked for."""
        return self.timesteps(steps)

    def add_noise(self, clean: Tensor, noise: Tensor, level) -> Tensor:
        """Clean latents as they are at a level of `sample`."""
        return self.schedule.add_noise(clean, noise, level)

    def sample(self, denoise: Callable, noise: Tensor, steps: int, keep: Callable | None = None) -> Iterable[Tensor]:
        """Latents after each of S steps of the family's usual sampler, from unit noise; `keep` as in `sample_ddim`."""
        return sample_ddim(denoise, noise, self.timesteps(steps), self.schedule, keep)

    def denoiser(self, cond: Condition, uncond: Condition, guidance_scale: float,
                 controls: list[Control] = (), shortcuts: Shortcuts = Shortcuts()) -> Callable:
        """The function a sampler calls.

        Args:
            cond: of B pictures; in its context the text's tokens come first, and ControlNets see only those.
            uncond: the unconditional side.
            guidance_scale: s; 1 or less leaves the unconditional side out.
            controls: one for each ControlNet.
            shortcuts: what is left out.

        Returns:
            (x, t) -> predicted noise, shaped as x. It remembers deep features: one function for one sampling.
        """
        both = cond
        if guidance_scale > 1:
            both = Condition(*(None if a is None else ops.concat((a, b), 0) for a, b in zip(uncond, cond)))
        whole, alone = ((*side, ops.narrow(side.context, 1, 0, self.context_length)) for side in (both, cond))
        scale = Tensor(guidance_scale, ms.float32)
        hints = ops.concat([control.hint for control in controls], 0) if controls else None
        kept = []  # deep features and what belongs to them, of the last step that made them

        def denoise(x: Tensor, t: float) -> Tensor:
            timestep = Tensor(t, ms.float32)
            context, y, text = alone if t in shortcuts.unguided else whole
            if t in shortcuts.shallow and kept and len(kept[0]) >= len(context):
                # The conditional half is the last; without ControlNets the residual has no halves.
                earlier = [part[-len(context):] if part.shape else part for part in kept]
                predicted = self.guided(x, timestep, context, scale, y, None, None, None, *earlier)[0]
                return self.schedule.noise_in(x, finished(predicted), t)
            scales = [control.scale if t in control.timesteps else 0.0 for control in controls]
            acting = (text, hints, Tensor(scales, ms.float32)) if any(scales) else (None, None, None)
            predicted, *made = self.guided(x, timestep, context, scale, y, *acting)
            if shortcuts.shallow:
                kept[:] = made
            return self.schedule.noise_in(x, finished(predicted), t)

        return denoise
