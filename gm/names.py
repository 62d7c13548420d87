"""Names on disk of what only SDXL has: its two text encoders; its UNet keeps the network's own names."""
from __future__ import annotations

from ldm.checkpoints.layout import Layout
from ldm.checkpoints.names import (
    CONTROLNET_PREFIX,
    HUGGING_FACE_BLOCKS,
    HUGGING_FACE_LAYERS,
    HUGGING_FACE_QKV,
    HUGGING_FACE_TEXT,
    IDLE,
    TORCH_NORMS,
    UNET_TORCH,
)

UNET_SDXL = Layout(UNET_TORCH.prefix, ignored=IDLE)
CONTROLNET_SDXL = Layout(CONTROLNET_PREFIX)

_TABLES = ((r"_embedding\.weight$", "_embedding.embedding_table"),)
_CLIP_L = "conditioner.embedders.0.transformer.text_model."
TEXT_L_SDXL = Layout(_CLIP_L, HUGGING_FACE_TEXT + HUGGING_FACE_LAYERS + _TABLES, stacked=HUGGING_FACE_QKV)
TEXT_L_TORCH = Layout(_CLIP_L, HUGGING_FACE_TEXT + HUGGING_FACE_BLOCKS, stacked=HUGGING_FACE_QKV, ignored=IDLE)

_BIG_G = "conditioner.embedders.1.model."
_IN_PROJ = ((r"\.in_proj\.(weight|bias)$", r".in_proj_\1"),)
TEXT_G_SDXL = Layout(_BIG_G, ((r"^token_embedding$", "token_embedding.embedding_table"),) + _IN_PROJ,
                     ignored=r"logit_scale$")
TEXT_G_TORCH = Layout(_BIG_G, ((r"^token_embedding$", "token_embedding.weight"),) + _IN_PROJ + TORCH_NORMS,
                      ignored=r"logit_scale$")
