"""The denoising UNet of both families: SD-1.5 and SDXL differ by the values of `UNetConfig` only."""
from __future__ import annotations

from dataclasses import dataclass

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from ldm.modules.attention import SpatialTransformer
from ldm.modules.convolution import Conv2d
from ldm.modules.layers import GroupNorm, Linear, SiLU, Upsample, silu, timestep_embedding
from ldm.modules.operators import repeated_like


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a UNet.

    Attributes:
        in_channels: latent channels (4).
        out_channels: channels predicted (4).
        model_channels: width M of the first level.
        channel_mult: width of each level as a multiple of M.
        num_res_blocks: residual blocks per level of the encoder; the decoder has one more.
        transformer_depth: transformer blocks after each residual block, per level; 0 is no attention.
        middle_depth: transformer blocks in the middle.
        context_dim: D, width of the context tokens.
        num_heads: heads of every attention, or -1 to take `num_head_channels`.
        num_head_channels: channels of one head, or -1.
        use_linear: proj_in and proj_out are matrices.
        adm_in_channels: width of the vector condition (SDXL), 0 for none.
        norm_groups: of every group norm. Groups of a single channel would lose its mean, which holds colours, so narrow
            networks have fewer.
    """

    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    transformer_depth: tuple[int, ...] = (1, 1, 1, 0)
    middle_depth: int = 1
    context_dim: int = 768
    num_heads: int = 8
    num_head_channels: int = -1
    use_linear: bool = False
    adm_in_channels: int = 0
    norm_groups: int = 32

    def heads(self, channels: int) -> int:
        """Heads of an attention over `channels`."""
        return self.num_heads if self.num_heads > 0 else channels // self.num_head_channels


class ResBlock(nn.Cell):
    """Two convolutions with the time embedding added between them, and a shortcut.

    The indices of `in_layers`, `emb_layers` and `out_layers` are those of the published names; index 2 of
    `out_layers` is a dropout of zero.
    """

    def __init__(self, channels: int, emb_channels: int, out_channels: int, groups: int = 32, dtype=mstype.float32):
        super().__init__()
        self.in_layers = nn.SequentialCell(
            GroupNorm(channels, groups), SiLU(), Conv2d(channels, out_channels, 3, padding=1, dtype=dtype))
        self.emb_layers = nn.SequentialCell(SiLU(), Linear(emb_channels, out_channels, dtype=dtype))
        self.out_layers = nn.SequentialCell(
            GroupNorm(out_channels, groups), SiLU(), nn.Identity(),
            Conv2d(out_channels, out_channels, 3, padding=1, dtype=dtype))
        self.skip_connection = (
            nn.Identity() if channels == out_channels else Conv2d(channels, out_channels, 1, dtype=dtype))

    def construct(self, x: Tensor, emb: Tensor) -> Tensor:
        """(n B, C, H, W) and (B, E) -> (n B, C', H, W)."""
        # Layer by layer: a SequentialCell takes a graph longer to compile than what is in it.
        shift = repeated_like(self.emb_layers[1](silu(emb)), x)
        y = self.in_layers[2](silu(self.in_layers[0](x)), shift)
        return self.skip_connection(x) + self.out_layers[3](silu(self.out_layers[0](y)))


class Downsample(nn.Cell):
    """3x3 convolution of stride 2: (B, C, H, W) -> (B, C, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, channels: int, dtype=mstype.float32):
        super().__init__()
        self.op = Conv2d(channels, channels, 3, stride=2, padding=1, dtype=dtype)

    def construct(self, x: Tensor) -> Tensor:
        return self.op(x)


class TimestepEmbedSequential(nn.SequentialCell):
    """The layers of one UNet block in order; each layer is given what its kind takes."""

    def __init__(self, layers: list):
        super().__init__(*layers)
        self.kinds = [type(layer).__name__ for layer in layers]  # graph mode cannot ask for a cell's class

    def construct(self, x: Tensor, emb: Tensor, context: Tensor, height: int, width: int) -> Tensor:
        """Apply all layers; `height` and `width` are the size an Upsample enlarges to."""
        for kind, layer in zip(self.kinds, self.cell_list):
            if kind == "ResBlock":
                x = layer(x, emb)
            elif kind == "SpatialTransformer":
                x = layer(x, context)
            elif kind == "Upsample":
                x = layer(x, height, width)
            else:
                x = layer(x)
        return x


class UNetEncoder(nn.Cell):
    """Time embedding, input blocks and middle block: the half a ControlNet copies.

    Args:
        config: sizes.
        dtype: of weights and activations; norms and embeddings stay in float32.
    """

    def __init__(self, config: UNetConfig, dtype=mstype.float32):
        super().__init__()
        self.config, self.dtype = config, dtype
        width, emb_dim = config.model_channels, config.model_channels * 4
        self.time_embed = nn.SequentialCell(
            Linear(width, emb_dim, dtype=dtype), SiLU(), Linear(emb_dim, emb_dim, dtype=dtype))
        self.label_emb = None
        if config.adm_in_channels:
            self.label_emb = nn.CellList([nn.SequentialCell(
                Linear(config.adm_in_channels, emb_dim, dtype=dtype), SiLU(), Linear(emb_dim, emb_dim, dtype=dtype))])

        blocks = [TimestepEmbedSequential([Conv2d(config.in_channels, width, 3, padding=1, dtype=dtype)])]
        self.skip_channels = [width]
        for level, (mult, depth) in enumerate(zip(config.channel_mult, config.transformer_depth)):
            for _ in range(config.num_res_blocks):
                layers = [ResBlock(width, emb_dim, mult * config.model_channels, config.norm_groups, dtype)]
                width = mult * config.model_channels
                blocks.append(TimestepEmbedSequential(layers + self.attention(width, depth)))
                self.skip_channels.append(width)
            if level + 1 < len(config.channel_mult):
                blocks.append(TimestepEmbedSequential([Downsample(width, dtype)]))
                self.skip_channels.append(width)
        self.input_blocks = nn.CellList(blocks)
        self.middle_block = TimestepEmbedSequential(
            [ResBlock(width, emb_dim, width, config.norm_groups, dtype)] + self.attention(width, config.middle_depth)
            + [ResBlock(width, emb_dim, width, config.norm_groups, dtype)])

    def attention(self, channels: int, depth: int) -> list:
        """The SpatialTransformer that follows a residual block, as a list; empty if depth is 0."""
        if depth == 0:
            return []
        c = self.config
        return [SpatialTransformer(channels, c.heads(channels), depth, c.context_dim, c.use_linear, c.norm_groups,
                                   self.dtype)]

    def embed(self, timesteps: Tensor, y) -> Tensor:
        """(B,) timesteps and (B, V) vector condition or None -> (B, 4 M)."""
        emb = self.time_embed(timestep_embedding(timesteps, self.config.model_channels).astype(self.dtype))
        if self.label_emb is not None:
            emb = emb + self.label_emb[0](y.astype(self.dtype))
        return emb


class UNetModel(UNetEncoder):
    """Predicts the noise in a latent."""

    def __init__(self, config: UNetConfig, dtype=mstype.float32):
        super().__init__(config, dtype)
        width, emb_dim = config.channel_mult[-1] * config.model_channels, config.model_channels * 4
        skips, blocks = list(self.skip_channels), []
        levels = list(zip(config.channel_mult, config.transformer_depth))
        for level in reversed(range(len(levels))):
            mult, depth = levels[level]
            for i in range(config.num_res_blocks + 1):
                layers = [ResBlock(width + skips.pop(), emb_dim, mult * config.model_channels, config.norm_groups,
                                   dtype)]
                width = mult * config.model_channels
                layers += self.attention(width, depth)
                if level > 0 and i == config.num_res_blocks:
                    layers.append(Upsample(width, dtype))
                blocks.append(TimestepEmbedSequential(layers))
        self.output_blocks = nn.CellList(blocks)
        self.out = nn.SequentialCell(
            GroupNorm(width, config.norm_groups), SiLU(), Conv2d(width, config.out_channels, 3, padding=1, dtype=dtype))

    def construct(self, x: Tensor, timesteps: Tensor, context: Tensor, y: Tensor = None, control=None) -> Tensor:
        """Predict the noise.

        Args:
            x: (B, 4, H, W) noisy latents, any H and W.
            timesteps: (B,) int or float.
            context: (B, T, D) text tokens, followed by image tokens if the UNet is patched for them; or (n B, T, D),
                for n predictions of each latent, and what comes before the first attention to the context is made once.
            y: (B, V) vector condition of SDXL, or None.
            control: residuals of a ControlNet, one per input block and one for the middle, or None.

        Returns:
            (B or n B, 4, H, W) float32.
        """
        emb = self.embed(timesteps, y)
        deep, skip = self.features(x, emb, context, control)
        return self.last_block(deep, skip, emb, context)

    def features(self, x: Tensor, emb: Tensor, context: Tensor, control=None) -> tuple:
        """All but the last output block: (n B, C, H, W) that it is given, and the (B, M, H, W) skip beside it.

        The former changes slowly from step to step (arXiv 2312.00858), and holds nine tenths of the work.
        """
        h, context = x.astype(self.dtype), context.astype(self.dtype)
        skips = []
        for block in self.input_blocks:
            h = block(h, emb, context, 0, 0)
            skips.append(h)
        h = self.middle_block(h, emb, context, 0, 0)
        if control is not None:
            h = h + control[len(skips)]
        last = len(self.output_blocks)
        for i in range(last - 1):
            skip = skips[last - 1 - i]
            if control is not None:
                skip = skip + control[last - 1 - i]
            after = skips[last - 2 - i].shape  # an odd size is only found again in the next skip
            h = self.output_blocks[i](ops.concat((h, repeated_like(skip, h)), 1), emb, context, after[2], after[3])
        return h, skips[0] if control is None else skips[0] + control[0]

    def first_skip(self, x: Tensor) -> Tensor:
        """What `features` gives as the skip, without a ControlNet."""
        return self.input_blocks[0](x.astype(self.dtype), None, None, 0, 0)

    def last_block(self, deep: Tensor, skip: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        """The noise, (n B, 4, H, W) float32, from what `features` and `embed` give."""
        h = self.output_blocks[len(self.output_blocks) - 1](
            ops.concat((deep, repeated_like(skip, deep)), 1), emb, context.astype(self.dtype), 0, 0)
        return self.out(h).astype(mstype.float32)
