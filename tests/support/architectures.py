"""Shapes of small networks under the names of published files."""
from __future__ import annotations

from ip_adapter.image_prompt import image_proj_config
from ip_adapter.names import IMAGE_ENCODER_TORCH, IMAGE_PROJ_TORCH
from ldm.checkpoints.architecture import autoencoder_config, image_config, text_config, unet_config
from ldm.checkpoints.file import TensorInfo
from ldm.checkpoints.layout import Layout
from ldm.checkpoints.names import TEXT_TORCH, UNET_TORCH, VAE_TORCH

LAYOUTS = {"unet": UNET_TORCH, "vae": VAE_TORCH, "text": TEXT_TORCH, "image": IMAGE_ENCODER_TORCH,
           "proj": IMAGE_PROJ_TORCH}
READERS = {"unet": unet_config, "vae": autoencoder_config, "text": lambda view: text_config(view, "gelu"),
           "image": image_config, "proj": image_proj_config}
# All that sizes are read off, of the smallest networks with every kind of layer.
SHAPES = {
    "unet": {"input_blocks.0.0.weight": (8, 4, 3, 3), "input_blocks.1.0.in_layers.2.weight": (8, 8, 3, 3),
             "input_blocks.1.1.transformer_blocks.0.norm1.gamma": (8,), "input_blocks.1.1.proj_in.weight": (8, 8),
             "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (8, 6),
             "input_blocks.2.0.op.weight": (8, 8, 3, 3), "input_blocks.3.0.in_layers.2.weight": (16, 8, 3, 3),
             "middle_block.1.transformer_blocks.0.norm1.gamma": (16,), "label_emb.0.0.weight": (32, 10),
             "out.2.weight": (4, 8, 3, 3)},
    "vae": {"encoder.conv_in.weight": (8, 3, 3, 3), "decoder.conv_in.weight": (16, 4, 3, 3),
            **{f"encoder.down.{i}.block.0.conv1.weight": (8 * m, 8, 3, 3) for i, m in enumerate((1, 2, 2, 2))}},
    "text": {"token_embedding": (49, 8), "positional_embedding": (77, 8), "text_projection": (8, 5),
             "transformer.resblocks.0.mlp.c_fc.weight": (32, 8), "transformer.resblocks.0.ln_1.gamma": (8,)},
    "image": {"conv1.weight": (16, 3, 14, 14), "positional_embedding": (5, 16), "proj": (16, 7),
              "transformer.resblocks.0.mlp.c_fc.weight": (64, 16), "transformer.resblocks.0.ln_1.gamma": (16,)},
    "proj": {"proj.weight": (24, 7), "norm.gamma": (6,)},
}


def tensors_of(layout: Layout, shapes: dict) -> dict:
    """What a file under a layout holds."""
    return {name: TensorInfo(on_disk, "float32") for path, shape in shapes.items()
            for name, (on_disk, _) in layout.source(path).disassemble(shape).items()}
