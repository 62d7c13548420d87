"""Put image attention into a finished UNet and take it out again."""
from __future__ import annotations

from typing import Iterator

from mindspore import Tensor, nn
from mindspore import dtype as mstype

from ip_adapter.attention import IPAdapterCrossAttention
from ldm.modules.attention import BasicTransformerBlock, CrossAttention

# The order in which IP-Adapter files count attention layers: diffusers' encoder, decoder, middle.
STAGES = ("input_blocks.", "output_blocks.", "middle_block.")


def transformer_blocks(unet: nn.Cell) -> Iterator[tuple]:
    """(path, block) of every transformer block, in the order of IP-Adapter files."""
    blocks = [(path, cell) for path, cell in unet.cells_and_names() if isinstance(cell, BasicTransformerBlock)]
    for stage in STAGES:
        yield from ((path, block) for path, block in blocks if path.startswith(stage))


def patch_cross_attention(unet: nn.Cell, num_tokens: int = 4, dtype=None) -> None:
    """Give every text attention of the UNet an image attention, in place. A ControlNet's copy is left alone.

    Args:
        unet: a UNet that is not patched yet.
        num_tokens: K, image tokens at the end of the context.
        dtype: of the weights it adds; that of the UNet if None.
    """
    for _, block in transformer_blocks(unet):
        assert isinstance(block.attn2, CrossAttention), "the UNet is patched already"
        block.attn2 = IPAdapterCrossAttention(block.attn2, num_tokens, dtype)
    unet.update_parameters_name()


def unpatch_cross_attention(unet: nn.Cell) -> None:
    """The inverse of `patch_cross_attention`: the UNet is as it was, weights included."""
    for _, block in transformer_blocks(unet):
        patched = block.attn2
        plain = CrossAttention(patched.to_q.in_channels, patched.attend.num_heads, patched.to_k.in_channels,
                               patched.to_q.weight.dtype)
        plain.to_q, plain.to_k, plain.to_v = patched.to_q, patched.to_k, patched.to_v
        plain.to_out, plain.attend, plain.inlined = patched.to_out, patched.attend, patched.inlined
        block.attn2 = plain
    unet.update_parameters_name()


def set_ip_scale(unet: nn.Cell, scale: float) -> None:
    """Set the weight of the image attention in every layer; 0 equals the UNet without it."""
    for _, block in transformer_blocks(unet):
        block.attn2.ip_scale.set_data(Tensor(scale, mstype.float32))
