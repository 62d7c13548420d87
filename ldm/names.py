"""Names on disk of the networks ldm owns: a handful of rules per kind of file (see `ldm/checkpoint.py`).

Network paths are CompVis/sgm names with MindSpore's norm names (gamma, beta).
"""
from __future__ import annotations

from ldm.checkpoint import Layout

# Every torch file: norms and embeddings are `weight` and `bias`.
TORCH_NORMS = ((r"\.gamma$", ".weight"), (r"\.beta$", ".bias"))
# Present in some torch files, of no use: constant indices, the schedule, the training average's bookkeeping.
TORCH_BUFFERS = (r"position_ids$|^(betas|alphas_cumprod|alphas_cumprod_prev|sqrt_(one_minus_)?alphas_cumprod"
                 r"|log_one_minus_alphas_cumprod|sqrt_recip(m1)?_alphas_cumprod|posterior_variance"
                 r"|posterior_log_variance_clipped|posterior_mean_coef[12]|logvar)$|^model_ema\.")

# MindSpore SD-1.5 files wrap most UNet convolutions in a cell of their own.
_SD15_CONVOLUTIONS = (
    (r"\.in_layers\.0\.", ".in_layers_norm."),
    (r"\.in_layers\.2\.", ".in_layers_conv.conv."),
    (r"\.out_layers\.0\.", ".out_layers_norm."),
    (r"\.out_layers\.3\.", ".out_layers_conv.conv."),
    (r"^(input_blocks\.0\.0|out\.2)\.", r"\1.conv."),
    (r"\.(op|skip_connection)\.", r".\1.conv."),
    (r"^(output_blocks\.\d+\.\d+)\.conv\.", r"\1.conv.conv."),
)
UNET_SD15 = Layout("model.diffusion_model.", _SD15_CONVOLUTIONS)
UNET_TORCH = Layout("model.diffusion_model.", TORCH_NORMS, ignored=TORCH_BUFFERS)

VAE_MINDSPORE = Layout("first_stage_model.")
VAE_TORCH = Layout("first_stage_model.", TORCH_NORMS)


def _vae_diffusers(q: str, k: str, v: str, out: str) -> Layout:
    """A diffusers autoencoder; its attention has been named in two ways."""
    return Layout("", (
        (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
        (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
        (r"\.up\.(\d+)\.block\.", r".up_blocks.\1.resnets."),
        (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
        # diffusers counts the decoder's levels from the smallest resolution: 3, 2, 1, 0 for four levels.
        (r"\.up_blocks\.0\.", ".up_blocks.third."), (r"\.up_blocks\.3\.", ".up_blocks.0."),
        (r"\.up_blocks\.third\.", ".up_blocks.3."),
        (r"\.up_blocks\.1\.", ".up_blocks.second."), (r"\.up_blocks\.2\.", ".up_blocks.1."),
        (r"\.up_blocks\.second\.", ".up_blocks.2."),
        (r"\.mid\.block_1\.", ".mid_block.resnets.0."), (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
        (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
        (r"\.mid\.attn_1\.q\.", f".mid_block.attentions.0.{q}."),
        (r"\.mid\.attn_1\.k\.", f".mid_block.attentions.0.{k}."),
        (r"\.mid\.attn_1\.v\.", f".mid_block.attentions.0.{v}."),
        (r"\.mid\.attn_1\.proj_out\.", f".mid_block.attentions.0.{out}."),
        (r"\.nin_shortcut\.", ".conv_shortcut."), (r"\.norm_out\.", ".conv_norm_out."),
    ) + TORCH_NORMS, flattened=r"attn_1\.(q|k|v|proj_out)\.weight$")


VAE_DIFFUSERS = (_vae_diffusers("query", "key", "value", "proj_attn"),
                 _vae_diffusers("to_q", "to_k", "to_v", "to_out.0"))

TEXT_SD15 = Layout("cond_stage_model.transformer.", (
    (r"^token_embedding$", "embedding_table"),
    (r"^transformer\.", "transformer_layer."),
    (r"\.attn\.", ".attn.attn."),
    (r"\.mlp\.", "."),
))
# Hugging Face's CLIP names, for text and image encoders alike.
HUGGING_FACE_BLOCKS = (
    (r"transformer\.resblocks\.", "encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."), (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.", ".self_attn."),
) + TORCH_NORMS
HUGGING_FACE_QKV = (r"\.in_proj\.", (".q_proj.", ".k_proj.", ".v_proj."))
HUGGING_FACE_TEXT = (
    (r"^token_embedding$", "embeddings.token_embedding.weight"),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^ln_final\.", "final_layer_norm."),
)
TEXT_TORCH = Layout("cond_stage_model.transformer.text_model.", HUGGING_FACE_TEXT + HUGGING_FACE_BLOCKS,
                    stacked=HUGGING_FACE_QKV)
