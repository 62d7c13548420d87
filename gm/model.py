"""SDXL put together: `ldm`'s model with two text encoders, a vector condition and noise levels for timesteps."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Iterable

import numpy as np
from mindspore import Tensor, ops

from gm.conditioner import Conditioner, Sizes, sizes_embedding
from gm.denoiser import Denoiser, add_noise, starting_noise, timesteps_of
from gm.discretizer import discretize
from gm.sampler import sample_euler
from ldm.model import Condition, Control, LatentDiffusion, Shortcuts


@dataclass
class DiffusionEngine(LatentDiffusion):
    """The parts of SDXL and what joins them.

    Attributes:
        sizes: of the pictures to make; set once a run, before anything is conditioned.
    """

    sizes: Sizes = Sizes((1024, 1024), (0, 0), (1024, 1024))

    def __post_init__(self):
        super().__post_init__()
        self.conditioner = Conditioner(self.text_encoders)
        self.tokenizers = self.conditioner.tokenizers

    def encode_text(self, texts: list) -> Condition:
        """B texts -> their tokens from both text encoders, and the pooled text alone as the vector."""
        return Condition(*self.conditioner(texts))

    def tell_sizes(self, text: Condition, sizes: np.ndarray) -> Condition:
        """Add the sizes of B pictures, (B, 6) as in `Sizes`, to what `encode_text` gives."""
        return Condition(text.context, ops.concat((text.vector, sizes_embedding(sizes)), -1))

    def set_size(self, height: int, width: int) -> None:
        """Ask for pictures of this size in pixels that were neither scaled nor cropped."""
        self.sizes = Sizes((height, width), (0, 0), (height, width))

    def condition(self, texts: list) -> Condition:
        """What B texts alone ask for, at `sizes`."""
        return self.tell_sizes(self.encode_text(texts), np.tile(self.sizes.numbers(), (len(texts), 1)))

    def levels(self, steps: int) -> np.ndarray:
        """(S + 1,) noise levels of `sample`."""
        return discretize("DiffusersDDPMDiscretization", steps, schedule=self.schedule)

    def timesteps(self, steps: int) -> np.ndarray:
        """(S,) at which the network is asked by `sample`."""
        return timesteps_of(self.levels(steps)[:-1], self.schedule)

    def add_noise(self, clean: Tensor, noise: Tensor, level) -> Tensor:
        """Clean latents as they are at a noise level."""
        return add_noise(clean, noise, level)

    def sample(self, denoise: Callable, noise: Tensor, steps: int, keep: Callable | None = None) -> Iterable[Tensor]:
        """Latents after each of S steps of Euler's method, from noise of unit variance."""
        sigmas = self.levels(steps)
        return sample_euler(denoise, starting_noise(noise, sigmas[0]), sigmas, keep=keep)

    def denoiser(self, cond: Condition, uncond: Condition, guidance_scale: float,
                 controls: list[Control] = (), shortcuts: Shortcuts = Shortcuts()) -> Denoiser:
        """As the base class', but (x, sigma) -> predicted clean x."""
        return Denoiser(super().denoiser(cond, uncond, guidance_scale, controls, shortcuts), self.schedule)
