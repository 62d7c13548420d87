"""ControlNet: a copy of the UNet's encoder that turns a hint picture into residuals for the UNet to add."""
from __future__ import annotations

from mindspore import Tensor, nn
from mindspore import dtype as mstype

from ldm.modules.convolution import Conv2d
from ldm.modules.layers import SiLU
from ldm.modules.operators import inline
from ldm.modules.unet import UNetConfig, UNetEncoder

# Widths of the hint's convolutions between its 3 colours and the UNet's first level, and which of them halve the size.
HINT_CHANNELS = (16, 16, 32, 32, 96, 96, 256)
HINT_STRIDES = (1, 1, 2, 1, 2, 1, 2)


class ControlNet(UNetEncoder):
    """The same for SD-1.5 and SDXL, which differ by the values of `config`.

    Args:
        config: sizes of the UNet it steers.
        dtype: of weights and activations; norms and embeddings stay in float32.

    Source:
        arXiv 2302.05543, fig. 3. lllyasviel/ControlNet: cldm/cldm.py.
    """

    def __init__(self, config: UNetConfig, dtype=mstype.float32):
        super().__init__(config, dtype)
        layers, width = [], 3
        for channels, stride in zip(HINT_CHANNELS, HINT_STRIDES):
            layers += [Conv2d(width, channels, 3, stride=stride, padding=1, dtype=dtype), SiLU()]
            width = channels
        self.input_hint_block = nn.SequentialCell(
            *layers, Conv2d(width, config.model_channels, 3, padding=1, dtype=dtype))
        self.zero_convs = nn.CellList(
            [nn.SequentialCell(Conv2d(channels, channels, 1, dtype=dtype)) for channels in self.skip_channels])
        self.middle_block_out = nn.SequentialCell(
            Conv2d(self.skip_channels[-1], self.skip_channels[-1], 1, dtype=dtype))
        inline(self)  # a graph runs it beside the UNet

    def embed_hint(self, hint: Tensor) -> Tensor:
        """The hint at latent size, the same for every step.

        Args:
            hint: (B, 3, 8 H, 8 W) float32 RGB in [0, 1].

        Returns:
            (B, M, H, W) float32.
        """
        return self.input_hint_block(hint.astype(self.dtype)).astype(mstype.float32)

    def construct(self, x: Tensor, timesteps: Tensor, context: Tensor, hint: Tensor, scale: Tensor,
                  y: Tensor = None) -> list:
        """Residuals for `UNetModel`.

        Args:
            x: (B, 4, H, W) noisy latents.
            timesteps: (B,) int or float.
            context: (B, T, D) tokens it may see: of the text, never of the image prompt.
            hint: (B or 1, M, H, W) what `embed_hint` gives.
            scale: () float32 that every residual is multiplied by.
            y: (B, V) vector condition of SDXL, or None.

        Returns:
            One tensor for each input block and one for the middle.
        """
        emb = self.embed(timesteps, y)
        h, context, scale = x.astype(self.dtype), context.astype(self.dtype), scale.astype(self.dtype)
        residuals = []
        for i in range(len(self.input_blocks)):
            h = self.input_blocks[i](h, emb, context, 0, 0)
            if i == 0:
                h = h + hint.astype(self.dtype)
            residuals.append(self.zero_convs[i](h) * scale)
        h = self.middle_block(h, emb, context, 0, 0)
        residuals.append(self.middle_block_out(h) * scale)
        return residuals
