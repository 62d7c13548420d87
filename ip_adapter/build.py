"""From a merged checkpoint to a model that is ready to run."""
from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from mindspore import Tensor, ops
from mindspore.nn.utils import no_init_parameters
from PIL import Image

from ip_adapter.config import ModelConfig
from ip_adapter.image_prompt import ImageProjConfig, ImageProjModel, IPAdapterImageEmbedder, start_image_proj
from ip_adapter.inputs import Hint
from ip_adapter.names import EMBEDDER_SD15, IMAGE_ATTENTION, TEXT_ONLY, image_encoder_mindspore
from ip_adapter.parts import SDSizes, controlnet_part, find_adapter, merged_sizes, vae_part
from ip_adapter.patch import patch_cross_attention, set_ip_scale
from ip_adapter.preprocess import clip_pixels, hint_pixels
from ldm.architecture import is_sdxl
from ldm.checkpoint import Part, check, load, parameter_shapes
from ldm.checkpoint_file import CheckpointError, CheckpointFile, open_checkpoint
from ldm.device import DTYPES
from ldm.model import Control, LatentDiffusion
from ldm.modules.autoencoder import AutoencoderKL
from ldm.modules.clip import CLIPImageTransformer, CLIPTextTransformer
from ldm.modules.unet import UNetModel
from ldm.names import CONTROLNET_PREFIX, TEXT_SD15, UNET_SD15, VAE_MINDSPORE
from ldm.schedule import NoiseSchedule


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

    def controls(self, hints: list[Hint], timesteps: np.ndarray) -> list[Control]:
        """Hints, one for each ControlNet, as the denoiser takes them: once a run is enough.

        Args:
            hints: pictures at the size of the output, and how they act.
            timesteps: those of the sampler.
        """
        return [Control(controlnet.embed_hint(Tensor(hint_pixels(hint.picture))), hint.scale, hint.acting(timesteps))
                for controlnet, hint in zip(self.diffusion.controlnets, hints)]

    def set_ip_scale(self, scale: float) -> None:
        """Set the weight of the image prompt; 0 equals plain text-to-image."""
        set_ip_scale(self.diffusion.unet, scale)


@dataclass
class ExtraParts:
    """Files that stand in for parts of the merged one, or add to it.

    Attributes:
        ip_adapter: published or finetuned adapter, or None.
        vae: autoencoder, or None.
        controlnets: one for each hint; None stands for the merged file's own.
    """

    ip_adapter: Path | None = None
    vae: Path | None = None
    controlnets: list[Path | None] = field(default_factory=list)


def build_sd(path: Path, config: ModelConfig, dtype: str = "float32",
             extra: ExtraParts = ExtraParts(), train_adapter: bool = False) -> ImagePromptModel:
    """Build SD-1.5 with its IP-Adapter and ControlNets; peak memory is the networks and one tensor.

    Args:
        path: merged checkpoint (tools/merge_ckpts_sd.py).
        config: what its tensors do not tell.
        dtype: "float32" or "float16".
        extra: files that take the place of parts of it.
        train_adapter: keep the adapter's weights in float32, and start a projector where the file has none (merged
            with --skip_ip).

    Raises:
        CheckpointError: a file does not hold exactly what is needed.
    """
    kind = DTYPES[dtype]
    adapter_kind = DTYPES["float32"] if train_adapter else kind
    with ExitStack() as stack:
        def opened(file) -> CheckpointFile:
            return stack.enter_context(open_checkpoint(file))

        base = opened(path)
        sizes = merged_sizes(base.tensors, config)
        adapter = opened(extra.ip_adapter) if extra.ip_adapter else base
        fresh = train_adapter and adapter is base and sizes.proj is None
        if None in (sizes.unet, sizes.vae, sizes.text, sizes.image) or adapter is base and not (fresh or sizes.proj):
            raise CheckpointError(f"{path}: {why_incomplete(base.tensors, sizes)}")
        with no_init_parameters():
            unet = UNetModel(sizes.unet, kind)
            if fresh:
                proj_size = ImageProjConfig(sizes.image.embed_dim, sizes.unet.context_dim)
                layouts = UNET_SD15, None
            else:
                proj_size, *layouts = find_adapter(adapter, unet, sizes.image.embed_dim)
            patch_cross_attention(unet, proj_size.num_tokens, adapter_kind)
            vae, text = AutoencoderKL(sizes.vae, kind), CLIPTextTransformer(sizes.text, kind)
            encoder, proj = CLIPImageTransformer(sizes.image, kind), ImageProjModel(proj_size, adapter_kind)
        networks = [
            (unet, Part(parameter_shapes(unet, TEXT_ONLY), base, UNET_SD15)),
            (unet, Part(parameter_shapes(unet, IMAGE_ATTENTION), adapter, layouts[0])),
            (vae, Part(parameter_shapes(vae), base, VAE_MINDSPORE)),
            (text, Part(parameter_shapes(text), base, TEXT_SD15)),
            (encoder, Part(parameter_shapes(encoder), base, image_encoder_mindspore(EMBEDDER_SD15))),
        ]
        if fresh:
            start_image_proj(proj)
        else:
            networks.append((proj, Part(parameter_shapes(proj), adapter, layouts[1])))
        # Parts of the merged file that another file stands in for are not read, nor are ControlNets nobody asked for.
        check([part for _, part in networks], allowed="|".join([re.escape(CONTROLNET_PREFIX)]
              + [rf"{IMAGE_ATTENTION}|^{re.escape(EMBEDDER_SD15)}image_proj\."] * (adapter is not base)))
        if extra.vae:
            vae, part = vae_part(opened(extra.vae), kind)
            networks[2] = (vae, part)
        controlnets = [controlnet_part(opened(file) if file else base, sizes.unet, kind) for file in extra.controlnets]
        for cell, part in networks + controlnets:
            load(cell, part)
            cell.set_train(False)
    schedule = NoiseSchedule(config.beta_start, config.beta_end)
    diffusion = LatentDiffusion(unet, vae, text, schedule, config.scale_factor, [cell for cell, _ in controlnets])
    return ImagePromptModel(diffusion, IPAdapterImageEmbedder(encoder, proj))


def why_incomplete(tensors: dict, sizes: SDSizes) -> str:
    """One line on a file in which a part of SD-1.5 with its adapter was not found."""
    if is_sdxl(tensors):
        return "is an SDXL checkpoint, expected SD-1.5; use image_variation_sdxl.py"
    if "model.diffusion_model.input_blocks.1.0.in_layers.0.weight" in tensors:
        return "is an original torch checkpoint, expected a merged one; run tools/merge_ckpts_sd.py --sd on it"
    parts = {"UNet": sizes.unet, "autoencoder": sizes.vae, "text encoder": sizes.text, "image encoder": sizes.image}
    names = [name for name, size in parts.items() if size is None]
    if not names:
        return "holds no IP-Adapter; give --ip_adapter FILE, or run tools/merge_ckpts_sd.py without --skip_ip"
    return f"holds no {', no '.join(names)}; expected a file written by tools/merge_ckpts_sd.py"
