"""From a merged checkpoint to a model that is ready to run."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mindspore import Tensor, ops
from mindspore.nn.utils import no_init_parameters
from PIL import Image

from ip_adapter.config import ModelConfig
from ip_adapter.image_prompt import ImageProjModel, IPAdapterImageEmbedder, image_proj_config
from ip_adapter.names import EMBEDDER_SD15, image_encoder_mindspore, image_proj_mindspore
from ip_adapter.patch import patch_cross_attention, set_ip_scale
from ip_adapter.preprocess import clip_pixels
from ldm.architecture import autoencoder_config, image_config, is_sdxl, text_config, unet_config
from ldm.checkpoint import Part, View, check, load, parameter_shapes
from ldm.checkpoint_file import CheckpointError, open_checkpoint
from ldm.device import DTYPES
from ldm.model import LatentDiffusion
from ldm.modules.autoencoder import AutoencoderKL
from ldm.modules.clip import CLIPImageTransformer, CLIPTextTransformer
from ldm.modules.unet import UNetModel
from ldm.names import TEXT_SD15, UNET_SD15, VAE_MINDSPORE

CONTROLNET = r"^model\.diffusion_model\.controlnet\."


@dataclass
class ImagePromptModel:
    """A diffusion model that takes pictures as prompts."""

    diffusion: LatentDiffusion
    embedder: IPAdapterImageEmbedder

    def image_tokens(self, image: Image.Image) -> tuple:
        """A picture to its tokens for both sides of the guidance, (1, K, D) float32 each: once a run is enough."""
        pixels = clip_pixels(image, self.embedder.image_encoder.config.image_size)
        return self.embedder(Tensor(pixels[None]))

    def condition(self, prompts: list, negative_prompts: list, image_tokens: tuple) -> tuple:
        """Text tokens followed by image tokens, for both sides of the guidance.

        Args:
            prompts: B texts.
            negative_prompts: B texts.
            image_tokens: what `image_tokens` gives.

        Returns:
            cond and uncond, (B, 77 + K, D) float32 each.
        """
        sides = []
        for texts, tokens in zip((prompts, negative_prompts), image_tokens):
            text = self.diffusion.encode_text(texts)
            sides.append(ops.concat((text, ops.broadcast_to(tokens, (len(texts),) + tokens.shape[1:])), 1))
        return tuple(sides)

    def set_ip_scale(self, scale: float) -> None:
        """Set the weight of the image prompt; 0 equals plain text-to-image."""
        set_ip_scale(self.diffusion.unet, scale)


def build_sd(path: Path, config: ModelConfig, dtype: str = "float32") -> ImagePromptModel:
    """Build SD-1.5 with its IP-Adapter from one merged file; peak memory is the networks and one tensor.

    Args:
        path: merged checkpoint (tools/merge_ckpts_sd.py), with or without a ControlNet.
        config: what its tensors do not tell.
        dtype: "float32" or "float16".

    Raises:
        CheckpointError: the file does not hold exactly what is needed.
    """
    with open_checkpoint(path) as file:
        tensors, kind = file.tensors, DTYPES[dtype]
        encoder_layout, proj_layout = image_encoder_mindspore(EMBEDDER_SD15), image_proj_mindspore(EMBEDDER_SD15)
        sizes = (
            unet_config(View(tensors, UNET_SD15), config.num_heads, config.num_head_channels),
            autoencoder_config(View(tensors, VAE_MINDSPORE)),
            text_config(View(tensors, TEXT_SD15), config.text_activation),
            image_config(View(tensors, encoder_layout), config.image_heads),
            image_proj_config(View(tensors, proj_layout)),
        )
        if None in sizes:
            raise CheckpointError(f"--ckpt_path {path}: {why_incomplete(tensors, sizes)}")
        with no_init_parameters():
            unet = UNetModel(sizes[0], kind)
            patch_cross_attention(unet, sizes[4].num_tokens)
            cells = (unet, AutoencoderKL(sizes[1], kind), CLIPTextTransformer(sizes[2], kind),
                     CLIPImageTransformer(sizes[3], kind), ImageProjModel(sizes[4], kind))
        layouts = (UNET_SD15, VAE_MINDSPORE, TEXT_SD15, encoder_layout, proj_layout)
        parts = [Part(parameter_shapes(cell), file, layout) for cell, layout in zip(cells, layouts)]
        check(parts, allowed=CONTROLNET)
        for cell, part in zip(cells, parts):
            load(cell, part)
    for cell in cells:
        cell.set_train(False)
    diffusion = LatentDiffusion(unet, cells[1], cells[2], config.scale_factor)
    return ImagePromptModel(diffusion, IPAdapterImageEmbedder(cells[3], cells[4]))


def why_incomplete(tensors: dict, sizes: tuple) -> str:
    """One line on a file in which a part of SD-1.5 with its adapter was not found."""
    if is_sdxl(tensors):
        return "is an SDXL checkpoint, expected SD-1.5; use image_variation_sdxl.py"
    if "model.diffusion_model.input_blocks.1.0.in_layers.0.weight" in tensors:
        return "is an original torch checkpoint, expected a merged one; run tools/merge_ckpts_sd.py --sd on it"
    if sizes[0] and sizes[1] and sizes[2]:
        return "holds no IP-Adapter (image encoder and projector); run tools/merge_ckpts_sd.py without --skip_ip"
    parts = ("UNet", "autoencoder", "text encoder", "image encoder", "image projector")
    names = [name for name, size in zip(parts, sizes) if size is None]
    return f"holds no {', no '.join(names)}; expected a file written by tools/merge_ckpts_sd.py"
