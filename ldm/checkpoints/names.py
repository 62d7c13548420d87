"""Names on disk of the networks ldm owns: a handful of rules per kind of file (see `ldm/checkpoints/loading.py`).

Network paths are CompVis/sgm names with MindSpore's norm names (gamma, beta).
"""
from __future__ import annotations

from dataclasses import replace

from ldm.checkpoints.layout import Layout

# Every torch file: norms and embeddings are `weight` and `bias`.
TORCH_NORMS = ((r"\.gamma$", ".weight"), (r"\.beta$", ".bias"))
# Present in some files of either family, of no use: constant indices, the schedule, the training average and its
# bookkeeping, what tools train beside a model, and what a whole CLIP has beyond the hidden states that are used of it.
IDLE = "|".join((
    r"position_ids$",
    r"^(betas|alphas_cumprod|alphas_cumprod_prev|sqrt_(one_minus_)?alphas_cumprod|log_one_minus_alphas_cumprod"
    r"|sqrt_recip(m1)?_alphas_cumprod|posterior_variance|posterior_log_variance_clipped|posterior_mean_coef[12]|logvar"
    r"|lvlb_weights|denoiser\.sigmas)$",
    r"^(model_ema|embedding_manager)\.",
    r"^(cond_stage_model|conditioner\.embedders\.0)\.(.+\.)?(logit_scale|text_projection(\.weight)?)$",
))

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
UNET_SD15 = Layout("model.diffusion_model.", _SD15_CONVOLUTIONS, ignored=IDLE)
UNET_TORCH = Layout("model.diffusion_model.", TORCH_NORMS, ignored=IDLE)

# Merged files keep the ControlNet inside the UNet.
CONTROLNET_PREFIX = "model.diffusion_model.controlnet."
CONTROLNET_SD15 = Layout(CONTROLNET_PREFIX, _SD15_CONVOLUTIONS + (
    (r"^(input_hint_block\.\d+)\.", r"\1.conv."),
    (r"^(zero_convs\.\d+|middle_block_out)\.0\.", r"\1.conv."),
))
# Original files come with and without a prefix; the older ones hold the whole model that was trained.
_WHOLE_MODEL = IDLE + r"|^(model\.diffusion_model|first_stage_model|cond_stage_model)\."
CONTROLNET_TORCH = (Layout("control_model.", TORCH_NORMS, ignored=_WHOLE_MODEL), Layout("", TORCH_NORMS, ignored=IDLE))


def _encoder_diffusers(levels: int = 4, num_res_blocks: int = 2) -> tuple:
    """Rules for input and middle blocks in diffusers' names, which count levels and the blocks within each."""
    rules = [(r"^time_embed\.0\.", "time_embedding.linear_1."), (r"^time_embed\.2\.", "time_embedding.linear_2."),
             (r"^label_emb\.0\.0\.", "add_embedding.linear_1."), (r"^label_emb\.0\.2\.", "add_embedding.linear_2."),
             (r"^input_blocks\.0\.0\.", "conv_in."),
             (r"^middle_block\.1\.", "mid_block.attentions.0."),
             (r"^middle_block\.0\.", "mid_block.resnets.0."), (r"^middle_block\.2\.", "mid_block.resnets.1.")]
    for level in range(levels):
        first = 1 + level * (num_res_blocks + 1)
        for i in range(num_res_blocks):
            rules += [(rf"^input_blocks\.{first + i}\.0\.", f"down_blocks.{level}.resnets.{i}."),
                      (rf"^input_blocks\.{first + i}\.1\.", f"down_blocks.{level}.attentions.{i}.")]
        rules.append((rf"^input_blocks\.{first + num_res_blocks}\.0\.op\.",
                      f"down_blocks.{level}.downsamplers.0.conv."))
    return tuple(rules) + (
        (r"\.in_layers\.0\.", ".norm1."), (r"\.in_layers\.2\.", ".conv1."), (r"\.emb_layers\.1\.", ".time_emb_proj."),
        (r"\.out_layers\.0\.", ".norm2."), (r"\.out_layers\.3\.", ".conv2."),
        (r"\.skip_connection\.", ".conv_shortcut."))


_HINT_DIFFUSERS = ((r"^input_hint_block\.0\.", "controlnet_cond_embedding.conv_in."),
                   (r"^input_hint_block\.14\.", "controlnet_cond_embedding.conv_out.")) + tuple(
    (rf"^input_hint_block\.{2 * i + 2}\.", f"controlnet_cond_embedding.blocks.{i}.") for i in range(6))
CONTROLNET_DIFFUSERS = Layout("", _encoder_diffusers() + _HINT_DIFFUSERS + (
    (r"^zero_convs\.(\d+)\.0\.", r"controlnet_down_blocks.\1."),
    (r"^middle_block_out\.0\.", "controlnet_mid_block."),
) + TORCH_NORMS)

VAE_MINDSPORE = Layout("first_stage_model.")
VAE_TORCH = Layout("first_stage_model.", TORCH_NORMS)
VAE_ALONE = Layout("", TORCH_NORMS, ignored=IDLE + r"|^loss\.")  # as trained by CompVis' code, in a file of its own


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
HUGGING_FACE_LAYERS = (
    (r"transformer\.resblocks\.", "encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."), (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.", ".self_attn."),
)
HUGGING_FACE_BLOCKS = HUGGING_FACE_LAYERS + TORCH_NORMS
HUGGING_FACE_QKV = (r"\.in_proj\.", (".q_proj.", ".k_proj.", ".v_proj."))
HUGGING_FACE_TEXT = (
    (r"^token_embedding$", "embeddings.token_embedding.weight"),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^ln_final\.", "final_layer_norm."),
)
TEXT_TORCH = Layout("cond_stage_model.transformer.text_model.", HUGGING_FACE_TEXT + HUGGING_FACE_BLOCKS,
                    stacked=HUGGING_FACE_QKV)


def without_text_model(layout: Layout) -> Layout:
    """The same text encoder as some save it, with one word less in its names; another network is left as it is."""
    return replace(layout, prefix=layout.prefix.removesuffix("text_model."))


# A whole CLIP's text encoder; the image encoder beside it is ip_adapter/names.py's.
CLIP_TEXT_TORCH = Layout("", HUGGING_FACE_TEXT + HUGGING_FACE_BLOCKS + (
    (r"^(?!text_projection$)", "text_model."),
    (r"^text_projection$", "text_projection.weight"),
), stacked=HUGGING_FACE_QKV, transposed=r"^text_projection$", ignored=IDLE)
