"""Sizes of a network, read off the tensors of a file.

The tensors say everything but head counts, norm groups, activations and scales, which belong to the family and stand in
configs/*.yaml. So one program serves every size of a family, and a file cannot disagree with its config.
"""
from __future__ import annotations

import math

from ldm.checkpoints.file import CheckpointError
from ldm.checkpoints.loading import MAX_COUNT, View
from ldm.modules.autoencoder import AutoencoderConfig
from ldm.modules.clip import CLIPImageConfig, CLIPTextConfig
from ldm.modules.unet import UNetConfig

AUTOENCODER_LEVELS = 4


def unet_config(view: View, num_heads: int = -1, num_head_channels: int = -1,
                norm_groups: int = 32) -> UNetConfig | None:
    """Sizes of the UNet (or of the UNet half of a ControlNet) in `view`; None if there is none.

    Args:
        view: the tensors, by UNet paths.
        num_heads: heads of every attention, or -1.
        num_head_channels: channels of one head, or -1.
        norm_groups: of every group norm.
    """
    first = view.shape("input_blocks.0.0.weight", 4)
    if first is None:
        return None
    model_channels, in_channels = first[:2]
    widths, depths, num_res_blocks, context_dim, use_linear = _levels(view)
    multiples = _multiples(widths, model_channels)
    if multiples is None or any(depths) and not context_dim:
        return None
    if num_res_blocks * (len(depths) + sum(depths)) > MAX_COUNT:
        raise CheckpointError(f"the UNet has {num_res_blocks} residual blocks on each of {len(depths)} levels, with "
                              f"{depths} transformer blocks, expected at most {MAX_COUNT} in all; give a published or "
                              "finetuned model")
    out, label = view.shape("out.2.weight", 4), view.shape("label_emb.0.0.weight", 2)
    return UNetConfig(
        in_channels=in_channels, out_channels=out[0] if out else in_channels, model_channels=model_channels,
        channel_mult=multiples, num_res_blocks=num_res_blocks, transformer_depth=tuple(depths),
        middle_depth=view.count("middle_block.1.transformer_blocks.{}.norm1.gamma"),
        context_dim=context_dim, num_heads=num_heads, num_head_channels=num_head_channels, use_linear=use_linear,
        adm_in_channels=label[1] if label else 0, norm_groups=norm_groups)


def _levels(view: View) -> tuple:
    """Of a UNet's encoder: widths and transformer depths of its levels, residual blocks of the first one, width of the
    context, and whether attention is entered by a matrix."""
    widths, depths, per_level, context_dim, use_linear = [], [], [0], 0, False
    for block in range(1, MAX_COUNT):
        convolution = view.shape(f"input_blocks.{block}.0.in_layers.2.weight", 4)
        if convolution is not None:
            depth = view.count(f"input_blocks.{block}.1.transformer_blocks.{{}}.norm1.gamma")
            if per_level[-1] == 0:
                widths.append(convolution[0])
                depths.append(depth)
            per_level[-1] += 1
            if depth:
                keys = view.shape(f"input_blocks.{block}.1.transformer_blocks.0.attn2.to_k.weight", 2)
                context_dim = keys[1] if keys else 0
                use_linear = view.shape(f"input_blocks.{block}.1.proj_in.weight", 2) is not None
        elif f"input_blocks.{block}.0.op.weight" in view:
            per_level.append(0)
        else:
            break
    return widths, depths, per_level[0], context_dim, use_linear


def _multiples(widths: list, unit: int) -> tuple | None:
    """Widths of levels as multiples of the first width, which they have to be."""
    return None if not widths or any(width % unit for width in widths) else tuple(width // unit for width in widths)


def autoencoder_config(view: View, norm_groups: int = 32) -> AutoencoderConfig | None:
    """Sizes of the autoencoder in `view`, every group norm with `norm_groups`; None if there is none."""
    first, last = view.shape("encoder.conv_in.weight", 4), view.shape("decoder.conv_in.weight", 4)
    if first is None or last is None:
        return None
    levels = view.count("encoder.down.{}.block.0.conv1.weight")
    shapes = [view.shape(f"encoder.down.{i}.block.0.conv1.weight", 4) for i in range(levels)]
    multiples = None if None in shapes else _multiples([shape[0] for shape in shapes], first[0])
    if multiples is None:
        return None
    if levels != AUTOENCODER_LEVELS:
        raise CheckpointError(f"the autoencoder has {levels} levels, expected {AUTOENCODER_LEVELS}, which make latents "
                              "of an eighth of the picture; give that of SD-1.5 or SDXL")
    return AutoencoderConfig(
        channels=first[0], channel_mult=multiples, num_res_blocks=view.count("encoder.down.0.block.{}.conv1.weight"),
        latent_channels=last[1], norm_groups=norm_groups)


def text_config(view: View, activation: str, head_width: int = 64) -> CLIPTextConfig | None:
    """Sizes of the text encoder in `view`; None if there is none. CLIP's text heads are 64 wide in every size."""
    table, first = view.shape("token_embedding", 2), view.shape("transformer.resblocks.0.mlp.c_fc.weight", 2)
    positions, projection = view.shape("positional_embedding", 2), view.shape("text_projection", 2)
    if None in (table, positions, first):
        return None
    width, heads = table[1], max(1, table[1] // head_width)
    if width % heads:
        return None
    return CLIPTextConfig(
        width=width, layers=view.count("transformer.resblocks.{}.ln_1.gamma"), heads=heads,
        mlp_width=first[0], activation=activation, projection=projection[1] if projection else 0,
        context_length=positions[0], vocab_size=table[0])


def image_config(view: View, heads: int = 16, activation: str = "gelu") -> CLIPImageConfig | None:
    """Sizes of the image encoder in `view`; None if there is none. ViT-L, ViT-H and ViT-bigG all have 16 heads."""
    patches, first = view.shape("conv1.weight", 4), view.shape("transformer.resblocks.0.mlp.c_fc.weight", 2)
    positions, projection = view.shape("positional_embedding", 2), view.shape("proj", 2)
    if None in (patches, first, positions, projection) or positions[0] < 2:  # the class, and one patch at least
        return None
    return CLIPImageConfig(
        width=patches[0], layers=view.count("transformer.resblocks.{}.ln_1.gamma"), heads=heads, mlp_width=first[0],
        patch_size=patches[2], image_size=math.isqrt(positions[0] - 1) * patches[2], embed_dim=projection[1],
        activation=activation)
