"""SDXL put together: `ldm`'s model with two text encoders, a vector condition and noise levels for timesteps."""
from __future__ import annotations

from dataclasses import dataclass

from mindspore import Tensor, ops

from gm.conditioner import Conditioner, Sizes
from gm.denoiser import Denoiser
from ldm.model import Condition, Control, LatentDiffusion


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

    def encode_text(self, texts: list) -> Tensor:
        """Texts -> (B, 77, D) float32 context of both text encoders."""
        return self.conditioner(texts)[0]

    def condition(self, texts: list) -> Condition:
        """What B texts alone ask for, at `sizes`."""
        context, pooled = self.conditioner(texts)
        sizes = self.sizes.embedding()
        return Condition(context, ops.concat((pooled, ops.broadcast_to(sizes, (len(texts),) + sizes.shape[1:])), -1))

    def denoiser(self, cond: Condition, uncond: Condition, guidance_scale: float,
                 controls: list[Control] = ()) -> Denoiser:
        """As the base class', but (x, sigma) -> predicted clean x."""
        return Denoiser(super().denoiser(cond, uncond, guidance_scale, controls), self.schedule)
