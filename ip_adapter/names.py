"""Names on disk of what an IP-Adapter adds: image encoder, projector, image attention.

Merged files keep the first two under the prefix of their family (`ip_adapter/families.py`).
"""
from __future__ import annotations

import re

from ldm.checkpoints.layout import Layout
from ldm.checkpoints.names import HUGGING_FACE_BLOCKS, HUGGING_FACE_QKV, IDLE, TORCH_NORMS


def image_encoder_mindspore(embedder: str) -> Layout:
    """The image encoder in a merged file."""
    return Layout(embedder + "image_encoder.model.visual.")


# Also inside a whole CLIP, whose text encoder is left out.
IMAGE_ENCODER_TORCH = Layout("", (
    (r"^class_embedding$", "embeddings.class_embedding"),
    (r"^conv1\.", "embeddings.patch_embedding."),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^ln_pre\.", "pre_layrnorm."), (r"^ln_post\.", "post_layernorm."),  # the first misspelt by its authors
) + HUGGING_FACE_BLOCKS + (
    (r"^(?!proj$)", "vision_model."),
    (r"^proj$", "visual_projection.weight"),
), stacked=HUGGING_FACE_QKV, transposed=r"^proj$", ignored=IDLE + r"|^(text_model|text_projection)\.|^logit_scale$")


def image_proj_mindspore(embedder: str) -> Layout:
    """The projector in a merged or finetuned file."""
    return Layout(embedder + "image_proj.")


IMAGE_PROJ_TORCH = Layout("image_proj.", TORCH_NORMS)


def image_attention_torch(block_paths: list, modules: str = "ip_adapter.", ignored: str = r"(?!)") -> Layout:
    """Image attention in a published adapter, where layers are counted: 1, 3, 5, ... (even numbers are self-attention).

    Args:
        block_paths: paths of the UNet's transformer blocks in the order of `ip_adapter.patch.transformer_blocks`.
        modules: what the layers are called, and what is before that.
        ignored: pattern of names beside them that are not read.
    """
    return Layout(modules, tuple((rf"^{re.escape(path)}\.attn2\.", f"{2 * i + 1}.")
                                 for i, path in enumerate(block_paths)), ignored=ignored)


def trained_adapter(block_paths: list, num_res_blocks: int, wrapped: str = "") -> tuple:
    """An adapter as tencent's training scripts keep it: in a whole checkpoint, with the UNet beside it.

    Image attention is there twice, counted and inside of the UNet. A .safetensors of accelerate holds tensors that are
    shared once, under the first name, which is the UNet's.

    Args:
        block_paths: see `image_attention_torch`.
        num_res_blocks: of the UNet.
        wrapped: prefix of all names; "module." if several devices trained it.

    Returns:
        Layouts of the image attention, counted and inside of the UNet, and that of the projector.
    """
    unet = wrapped + "unet."
    ignored = rf"^{re.escape(unet)}"
    inside = tuple((rf"^{re.escape(path)}\.attn2\.", f"{_diffusers_block(path, num_res_blocks)}.attn2.processor.")
                   for path in block_paths)
    return (image_attention_torch(block_paths, wrapped + "adapter_modules.", ignored),
            Layout(unet, inside, ignored=ignored), Layout(wrapped + "image_proj_model.", TORCH_NORMS, ignored=ignored))


def _diffusers_block(path: str, num_res_blocks: int) -> str:
    """diffusers' path of a transformer block; it counts levels and the attentions within each."""
    stage, number, rest = re.fullmatch(r"(input|output|middle)_blocks?\.(?:(\d+)\.)?1\.(.+)", path).groups()
    if stage == "middle":
        return f"mid_block.attentions.0.{rest}"
    # Of a level of the encoder the last block makes the picture smaller; a decoder has one block with attention more.
    level, place = divmod(int(number) - (stage == "input"), num_res_blocks + 1)
    return f"{'down' if stage == 'input' else 'up'}_blocks.{level}.attentions.{place}.{rest}"


# Parameters of a patched UNet: those an adapter brings, and all others.
IMAGE_ATTENTION = r"\.to_[kv]_ip\.weight$"
TEXT_ONLY = r"^(?!.*\.to_[kv]_ip\.)"
