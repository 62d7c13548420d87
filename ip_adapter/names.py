"""Names on disk of what an IP-Adapter adds: image encoder, projector, image attention.

Merged files keep the first two under the prefix of their family (`ip_adapter/families.py`).
"""
from __future__ import annotations

import re

from ldm.layout import Layout
from ldm.names import HUGGING_FACE_BLOCKS, HUGGING_FACE_QKV, TORCH_BUFFERS, TORCH_NORMS


def image_encoder_mindspore(embedder: str) -> Layout:
    """The image encoder in a merged file."""
    return Layout(embedder + "image_encoder.model.visual.")


IMAGE_ENCODER_TORCH = Layout("", (
    (r"^class_embedding$", "embeddings.class_embedding"),
    (r"^conv1\.", "embeddings.patch_embedding."),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^ln_pre\.", "pre_layrnorm."), (r"^ln_post\.", "post_layernorm."),  # the first misspelt by its authors
) + HUGGING_FACE_BLOCKS + (
    (r"^(?!proj$)", "vision_model."),
    (r"^proj$", "visual_projection.weight"),
), stacked=HUGGING_FACE_QKV, transposed=r"^proj$", ignored=TORCH_BUFFERS)


def image_proj_mindspore(embedder: str) -> Layout:
    """The projector in a merged or finetuned file."""
    return Layout(embedder + "image_proj.")


IMAGE_PROJ_TORCH = Layout("image_proj.", TORCH_NORMS)


def image_attention_torch(block_paths: list) -> Layout:
    """Image attention in a published adapter, where layers are counted: 1, 3, 5, ... (even numbers are self-attention).

    Args:
        block_paths: paths of the UNet's transformer blocks in the order of `ip_adapter.patch.transformer_blocks`.
    """
    return Layout("", tuple((rf"^{re.escape(path)}\.attn2\.", f"ip_adapter.{2 * i + 1}.")
                            for i, path in enumerate(block_paths)))


# Parameters of a patched UNet: those an adapter brings, and all others.
IMAGE_ATTENTION = r"\.to_[kv]_ip\.weight$"
TEXT_ONLY = r"^(?!.*\.to_[kv]_ip\.)"
