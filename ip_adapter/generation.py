"""Pictures made within another program, for validation and evaluation; the scripts' own run is `run.py`."""
from __future__ import annotations

from typing import Callable, Sequence

import numpy as np
from mindspore import Tensor, ops

from ip_adapter.build import ImagePromptModel
from ldm.ddim import sample_ddim
from ldm.model import Condition, Control


def contexts(model: ImagePromptModel, texts: Tensor, empty_text: Tensor, embedding: Tensor) -> tuple:
    """Conditions of both sides of the guidance.

    Args:
        model: whose projector makes image tokens.
        texts: (B, T, D) text tokens.
        empty_text: (1, T, D) text tokens of the unconditional side.
        embedding: (B, E) image embeddings.

    Returns:
        cond and uncond.
    """
    proj = model.embedder.image_proj
    empty_text = ops.broadcast_to(empty_text, texts.shape)
    return (Condition(ops.concat((texts, proj(embedding)), 1)),
            Condition(ops.concat((empty_text, proj(ops.zeros_like(embedding))), 1)))


def generate(model: ImagePromptModel, sides: tuple, seeds: Sequence[int], size: int, timesteps: np.ndarray,
             guidance_scale: float, controls: list[Control] = (), keep: Callable | None = None) -> np.ndarray:
    """Make square pictures with DDIM, from noise alone.

    Args:
        model: patched.
        sides: what `contexts` gives.
        seeds: one for each of the B pictures, each the only source of its noise.
        size: side in pixels.
        timesteps: of the sampler.
        guidance_scale: of classifier-free guidance.
        controls: hints, for all pictures of the batch.
        keep: noise -> what `sample_ddim` takes to hold a part as it is, or None.

    Returns:
        (B, size, size, 3) uint8.
    """
    diffusion = model.diffusion
    shape = diffusion.unet.config.in_channels, size // 8, size // 8
    noise = Tensor(np.stack([np.random.default_rng(seed).standard_normal(shape, np.float32) for seed in seeds]))
    denoise = diffusion.denoiser(*sides, guidance_scale, controls)
    *_, latents = sample_ddim(denoise, noise, timesteps, diffusion.schedule, keep(noise) if keep else None)
    return diffusion.decode(latents)
