"""Sizes of a network, read off the tensors of a file.

The tensors say everything but head counts, norm groups, activations and scales, which belong to the family and stand in
configs/*.yaml. So one program serves every size of a family, and a file cannot disagree with its config.
"""
from __future__ import annotations

import math

from ldm.checkpoint import View
from ldm.modules.autoencoder import AutoencoderConfig
from ldm.modules.clip import CLIPImageConfig, CLIPTextConfig
from ldm.modules.unet import UNetConfig


def unet_config(view: View, num_heads: int = -1, num_head_channels: int = -1,
                norm_groups: int = 32) -> UNetConfig | None:
    """Sizes of the UNet (or of the UNet half of a ControlNet) in `view`; None if there is none.

    Args:
        view: the tensors, by UNet paths.
        num_heads: heads of every attention, or -1.
        num_head_channels: channels of one head, or -1.
        norm_groups: of every group norm.
    """
    if "input_blocks.0.0.weight" not in view or "input_blocks.1.0.in_layers.2.weight" not in view:
        return None
    model_channels, in_channels = view.shape("input_blocks.0.0.weight")[:2]
    widths, depths, per_level, block, context_dim, use_linear = [], [], [0], 1, 0, False
    while True:
        convolution = view.shape(f"input_blocks.{block}.0.in_layers.2.weight")
        if convolution is not None:
            depth = view.count(f"input_blocks.{block}.1.transformer_blocks.{{}}.norm1.gamma")
            if per_level[-1] == 0:
                widths.append(convolution[0])
                depths.append(depth)
            per_level[-1] += 1
            if depth:
                context_dim = view.shape(f"input_blocks.{block}.1.transformer_blocks.0.attn2.to_k.weight")[1]
                use_linear = len(view.shape(f"input_blocks.{block}.1.proj_in.weight")) == 2
        elif f"input_blocks.{block}.0.op.weight" in view:
            per_level.append(0)
        else:
            break
        block += 1
    out, label = view.shape("out.2.weight"), view.shape("label_emb.0.0.weight")
    return UNetConfig(
        in_channels=in_channels, out_channels=out[0] if out else in_channels, model_channels=model_channels,
        channel_mult=tuple(width // model_channels for width in widths), num_res_blocks=per_level[0],
        transformer_depth=tuple(depths), middle_depth=view.count("middle_block.1.transformer_blocks.{}.norm1.gamma"),
        context_dim=context_dim, num_heads=num_heads, num_head_channels=num_head_channels, use_linear=use_linear,
        adm_in_channels=label[1] if label else 0, norm_groups=norm_groups)


def autoencoder_config(view: View, norm_groups: int = 32) -> AutoencoderConfig | None:
    """Sizes of the autoencoder in `view`, every group norm with `norm_groups`; None if there is none."""
    first, last = view.shape("encoder.conv_in.weight"), view.shape("decoder.conv_in.weight")
    if first is None or last is None:
        return None
    levels = view.count("encoder.down.{}.block.0.conv1.weight")
    widths = [view.shape(f"encoder.down.{i}.block.0.conv1.weight")[0] for i in range(levels)]
    return AutoencoderConfig(
        channels=first[0], channel_mult=tuple(width // first[0] for width in widths),
        num_res_blocks=view.count("encoder.down.0.block.{}.conv1.weight"), latent_channels=last[1],
        norm_groups=norm_groups)


def text_config(view: View, activation: str, head_width: int = 64) -> CLIPTextConfig | None:
    """Sizes of the text encoder in `view`; None if there is none. CLIP's text heads are 64 wide in every size."""
    table, first = view.shape("token_embedding"), view.shape("transformer.resblocks.0.mlp.c_fc.weight")
    positions, projection = view.shape("positional_embedding"), view.shape("text_projection")
    if table is None or positions is None or first is None:
        return None
    return CLIPTextConfig(
        width=table[1], layers=view.count("transformer.resblocks.{}.ln_1.gamma"), heads=max(1, table[1] // head_width),
        mlp_width=first[0], activation=activation, projection=projection[1] if projection else 0,
        context_length=positions[0], vocab_size=table[0])


def image_config(view: View, heads: int = 16, activation: str = "gelu") -> CLIPImageConfig | None:
    """Sizes of the image encoder in `view`; None if there is none. ViT-L, ViT-H and ViT-bigG all have 16 heads."""
    patches, first = view.shape("conv1.weight"), view.shape("transformer.resblocks.0.mlp.c_fc.weight")
    positions, projection = view.shape("positional_embedding"), view.shape("proj")
    if None in (patches, first, positions, projection):
        return None
    return CLIPImageConfig(
        width=patches[0], layers=view.count("transformer.resblocks.{}.ln_1.gamma"), heads=heads, mlp_width=first[0],
        patch_size=patches[2], image_size=math.isqrt(positions[0] - 1) * patches[2], embed_dim=projection[1],
        activation=activation)
