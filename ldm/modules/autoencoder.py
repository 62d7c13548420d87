"""The autoencoder between pictures and latents (AutoencoderKL), the same for SD-1.5 and SDXL."""
from __future__ import annotations

from dataclasses import dataclass

from mindspore import Tensor, nn
from mindspore import dtype as mstype

from ldm.modules.attention import Attention
from ldm.modules.convolution import Conv2d
from ldm.modules.layers import GroupNorm, Linear, Upsample, normed_conv


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of an autoencoder.

    Attributes:
        channels: width of the level at picture size.
        channel_mult: width of each level as a multiple of `channels`; each further level halves the picture.
        num_res_blocks: residual blocks per level of the encoder; the decoder has one more.
        latent_channels: channels of a latent.
        norm_groups: of every group norm; see `UNetConfig`. Without channel means, a network of few channels keeps what
            colours it has seen in a bright spot, which pictures then show.
    """

    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    latent_channels: int = 4
    norm_groups: int = 32


class ResnetBlock(nn.Cell):
    """norm, SiLU, convolution, twice; added to the (projected) input."""

    def __init__(self, channels: int, out_channels: int, groups: int, dtype):
        super().__init__()
        self.norm1 = GroupNorm(channels, groups, epsilon=1e-6)
        self.conv1 = Conv2d(channels, out_channels, 3, padding=1, dtype=dtype)
        self.norm2 = GroupNorm(out_channels, groups, epsilon=1e-6)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1, dtype=dtype)
        self.project = channels != out_channels
        self.nin_shortcut = Conv2d(channels, out_channels, 1, dtype=dtype) if self.project else None

    def construct(self, x: Tensor) -> Tensor:
        y = normed_conv(self.norm2, self.conv2, normed_conv(self.norm1, self.conv1, x))
        return (self.nin_shortcut(x) if self.project else x) + y


class AttnBlock(nn.Cell):
    """Self-attention with one head over all positions, added to its input."""

    def __init__(self, channels: int, groups: int, dtype):
        super().__init__()
        self.norm = GroupNorm(channels, groups, epsilon=1e-6)
        self.q = Linear(channels, channels, as_convolution=True, dtype=dtype)
        self.k = Linear(channels, channels, as_convolution=True, dtype=dtype)
        self.v = Linear(channels, channels, as_convolution=True, dtype=dtype)
        self.proj_out = Linear(channels, channels, as_convolution=True, dtype=dtype)
        self.attend = Attention(1)

    def construct(self, x: Tensor) -> Tensor:
        y = self.norm(x).reshape((x.shape[0], x.shape[1], -1))
        y = self.attend(self.q.from_maps(y), self.k.from_maps(y), self.v.from_maps(y))
        return x + self.proj_out.to_maps(y).reshape(x.shape)


class _Middle(nn.Cell):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int, groups: int, dtype):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups, dtype)
        self.attn_1 = AttnBlock(channels, groups, dtype)
        self.block_2 = ResnetBlock(channels, channels, groups, dtype)

    def construct(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class _Downsample(nn.Cell):
    """3x3 convolution of stride 2 that pads below and to the right only."""

    def __init__(self, channels: int, dtype):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=(0, 1, 0, 1), dtype=dtype)

    def construct(self, x: Tensor) -> Tensor:
        return self.conv(x)


class _Level(nn.Cell):
    """The residual blocks of one resolution, and the change of resolution after them."""

    def __init__(self, widths: list, groups: int, dtype, downsample: bool = False, upsample: bool = False):
        super().__init__()
        self.block = nn.CellList([ResnetBlock(a, b, groups, dtype) for a, b in zip(widths, widths[1:])])
        self.resize = "down" if downsample else "up" if upsample else ""
        self.downsample = _Downsample(widths[-1], dtype) if downsample else None
        self.upsample = Upsample(widths[-1], dtype) if upsample else None

    def construct(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        if self.resize == "down":
            x = self.downsample(x)
        elif self.resize == "up":
            x = self.upsample(x, 2 * x.shape[2], 2 * x.shape[3])
        return x


class Encoder(nn.Cell):
    """(B, 3, H, W) -> (B, 2 z, H / 8, W / 8): mean and log variance before `quant_conv`."""

    def __init__(self, config: AutoencoderConfig, dtype=mstype.float32):
        super().__init__()
        widths = [config.channels * m for m in (1,) + config.channel_mult]
        last = len(config.channel_mult) - 1
        self.conv_in = Conv2d(3, widths[0], 3, padding=1, dtype=dtype)
        self.down = nn.CellList([
            _Level([widths[i]] + [widths[i + 1]] * config.num_res_blocks, config.norm_groups, dtype,
                   downsample=i < last)
            for i in range(last + 1)])
        self.mid = _Middle(widths[-1], config.norm_groups, dtype)
        self.norm_out = GroupNorm(widths[-1], config.norm_groups, epsilon=1e-6)
        self.conv_out = Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1, dtype=dtype)

    def construct(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return normed_conv(self.norm_out, self.conv_out, self.mid(x))


class Decoder(nn.Cell):
    """(B, z, h, w) -> (B, 3, 8 h, 8 w)."""

    def __init__(self, config: AutoencoderConfig, dtype=mstype.float32):
        super().__init__()
        widths = [config.channels * m for m in config.channel_mult]
        top = len(widths) - 1
        self.conv_in = Conv2d(config.latent_channels, widths[top], 3, padding=1, dtype=dtype)
        self.mid = _Middle(widths[top], config.norm_groups, dtype)
        self.up = nn.CellList([  # index 0 is the largest resolution, which comes last
            _Level([widths[min(i + 1, top)]] + [widths[i]] * (config.num_res_blocks + 1), config.norm_groups, dtype,
                   upsample=i > 0)
            for i in range(top + 1)])
        self.norm_out = GroupNorm(widths[0], config.norm_groups, epsilon=1e-6)
        self.conv_out = Conv2d(widths[0], 3, 3, padding=1, dtype=dtype)

    def construct(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for i in range(len(self.up)):
            x = self.up[len(self.up) - 1 - i](x)
        return normed_conv(self.norm_out, self.conv_out, x)


class AutoencoderKL(nn.Cell):
    """Pictures to latents and back; latents here are unscaled.

    Args:
        config: sizes.
        dtype: of weights and activations.
    """

    def __init__(self, config: AutoencoderConfig, dtype=mstype.float32):
        super().__init__()
        self.config, self.dtype = config, dtype
        self.encoder, self.decoder = Encoder(config, dtype), Decoder(config, dtype)
        self.quant_conv = Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1, dtype=dtype)
        self.post_quant_conv = Conv2d(config.latent_channels, config.latent_channels, 1, dtype=dtype)

    def encode(self, image: Tensor) -> Tensor:
        """The posterior of a picture.

        Args:
            image: (B, 3, H, W) float32 in [-1, 1].

        Returns:
            (B, 2 z, H / 8, W / 8) float32: mean (which is also the mode), then log variance.
        """
        return self.quant_conv(self.encoder(image.astype(self.dtype))).astype(mstype.float32)

    def construct(self, z: Tensor) -> Tensor:
        """Decode: (B, z, h, w) latents -> (B, 3, 8 h, 8 w) float32, about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z.astype(self.dtype))).astype(mstype.float32)
