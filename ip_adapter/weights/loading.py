"""From a merged checkpoint to a model that is ready to run."""
from __future__ import annotations

import gc
import re
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import numpy as np
from mindspore import Tensor, ops
from mindspore.nn.utils import no_init_parameters
from PIL import Image

from gm.model import DiffusionEngine
from ip_adapter.config import ModelConfig
from ip_adapter.families import SD15, SDXL, Family, family_of
from ip_adapter.image_prompt import ImageProjConfig, ImageProjModel, IPAdapterImageEmbedder, start_image_proj
from ip_adapter.images.preprocess import clip_pixels, hint_pixels
from ip_adapter.inference.inputs import Hint
from ip_adapter.names import IMAGE_ATTENTION, TEXT_ONLY
from ip_adapter.patch import patch_cross_attention, set_ip_scale
from ip_adapter.weights.parts import ModelSizes, check_channels, controlnet_part, find_adapter, merged_sizes, vae_part
from ldm.checkpoints.file import CheckpointError, CheckpointFile, open_checkpoint
from ldm.checkpoints.loading import Part, check, leave_memory, load, parameter_shapes
from ldm.checkpoints.names import CONTROLNET_PREFIX
from ldm.device import DTYPES
from ldm.model import Condition, Control, LatentDiffusion
from ldm.modules.autoencoder import AutoencoderKL
from ldm.modules.clip import CLIPImageTransformer, CLIPTextTransformer
from ldm.modules.unet import UNetModel


@dataclass
class ImagePromptModel:
    """A diffusion model that takes pictures as prompts.

    Attributes:
        family: of the model.
        diffusion: its networks.
        embedder: from a picture to image tokens.
        load_rest: reads what a staged model has not read yet; None once all is there.
    """

    family: Family
    diffusion: LatentDiffusion
    embedder: IPAdapterImageEmbedder
    load_rest: Callable | None = None

    def conditions(self, image: Image.Image, prompts: list) -> list:
        """What the pictures of a run are asked for.

        Args:
            image: the picture prompt.
            prompts: (prompt, negative prompt) pairs.

        Returns:
            For each pair the conditions of both sides of the guidance, of one picture: text tokens, then image tokens.
        """
        embedding = self.embed(image)
        return [self.with_image([self.diffusion.condition([text]) for text in pair], embedding) for pair in prompts]

    def embed(self, image: Image.Image) -> Tensor:
        """A picture of any size -> (1, E) float32 image embedding."""
        encoder = self.embedder.image_encoder
        return encoder(Tensor(clip_pixels(image, encoder.config.image_size)[None]))

    def with_image(self, texts: list, embedding: Tensor) -> tuple:
        """Image tokens added to the texts of both sides, of one picture each; the negative one sees no picture."""
        return tuple(Condition(ops.concat((text.context, tokens), 1), text.vector)
                     for text, tokens in zip(texts, self.embedder.project(embedding)))

    def release_encoders(self) -> None:
        """Give the memory of the text and image encoders back; nothing can be encoded after this."""
        leave_memory(*self.diffusion.text_encoders, self.embedder.image_encoder)
        self.diffusion.text_encoders.clear()
        self.embedder.image_encoder = None
        gc.collect()

    def start_denoising(self) -> None:
        """Let the encoders leave memory, and read what a staged model has not read yet: UNet, autoencoder, the rest."""
        if self.load_rest is None:
            return
        self.release_encoders()
        self.load_rest()
        self.load_rest = None

    def release_denoiser(self) -> None:
        """Give the memory of UNet and ControlNets back; latents can be decoded after this, and no more made."""
        leave_memory(self.diffusion.unet, *self.diffusion.controlnets)
        self.diffusion.unet = self.diffusion.guided = None
        self.diffusion.controlnets = []
        gc.collect()

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


def build_model(path: Path, config: ModelConfig, dtype: str = "float32", extra: ExtraParts = ExtraParts(),
                train_adapter: bool = False, staged: bool = False, family: Family | None = SD15) -> ImagePromptModel:
    """Build a model with its IP-Adapter and ControlNets; peak memory is the networks and one tensor.

    Args:
        path: merged checkpoint (tools/merge_ckpts_sd.py, tools/merge_ckpts_sdxl.py).
        config: what its tensors do not tell.
        dtype: "float32" or "float16".
        extra: files that take the place of parts of it.
        train_adapter: keep the adapter's weights in float32, and start a projector where the file has none (merged
            with --skip_ip).
        staged: everything is checked, but only what makes conditions is read; `ImagePromptModel.start_denoising`
            reads the rest, so that the encoders and the UNet are never in memory together.
        family: of the model; None for that of the file.

    Raises:
        CheckpointError: a file does not hold exactly what is needed.
    """
    kind = DTYPES[dtype]
    adapter_kind = DTYPES["float32"] if train_adapter else kind
    with ExitStack() as stack:
        def opened(file) -> CheckpointFile:
            return stack.enter_context(open_checkpoint(file))

        base = opened(path)
        family = family or family_of(base.tensors)
        vae_kind = DTYPES["float32"] if family.float32_vae else kind
        sizes = merged_sizes(base.tensors, family, config)
        adapter = opened(extra.ip_adapter) if extra.ip_adapter else base
        fresh = train_adapter and adapter is base and sizes.proj is None
        if sizes.absent() or family_of(base.tensors) is not family or adapter is base and not (fresh or sizes.proj):
            raise CheckpointError(f"{path}: {why_incomplete(base.tensors, sizes, family)}")
        check_channels(str(path), sizes.unet, None if extra.vae else sizes.vae)
        with no_init_parameters():
            unet = UNetModel(sizes.unet, kind)
            if fresh:
                proj_size = ImageProjConfig(sizes.image.embed_dim, sizes.unet.context_dim)
                layouts = family.mindspore[0], None
            else:
                proj_size, *layouts = find_adapter(adapter, unet, sizes.image.embed_dim, family)
            patch_cross_attention(unet, proj_size.num_tokens, adapter_kind)
            vae, texts = AutoencoderKL(sizes.vae, vae_kind), [CLIPTextTransformer(size, kind) for size in sizes.texts]
            encoder, proj = CLIPImageTransformer(sizes.image, kind), ImageProjModel(proj_size, adapter_kind)
        unet_layout, vae_layout, *text_layouts = family.mindspore
        encoders = [(text, Part(parameter_shapes(text), base, layout)) for text, layout in zip(texts, text_layouts)]
        encoders.append((encoder, Part(parameter_shapes(encoder), base, family.image_encoder)))
        if fresh:
            start_image_proj(proj)
        else:
            encoders.append((proj, Part(parameter_shapes(proj), adapter, layouts[1])))
        denoising = [(unet, Part(parameter_shapes(unet, TEXT_ONLY), base, unet_layout)),
                     (unet, Part(parameter_shapes(unet, IMAGE_ATTENTION), adapter, layouts[0]))]
        autoencoder = [] if extra.vae else [(vae, Part(parameter_shapes(vae), base, vae_layout))]
        # Parts of the merged file that another file stands in for are not read, nor are ControlNets nobody asked for.
        check([part for _, part in encoders + denoising + autoencoder], allowed="|".join(
            [re.escape(CONTROLNET_PREFIX)] + [family.adapter_names] * (adapter is not base)
            + [rf"^{re.escape(vae_layout.prefix)}"] * bool(extra.vae)))
        if extra.vae:
            vae, part = vae_part(opened(extra.vae), sizes.unet, config.norm_groups, vae_kind)
            autoencoder = [(vae, part)]
        controlnets = [controlnet_part(opened(file) if file else base, sizes.unet, family, kind)
                       for file in extra.controlnets]
        denoising += autoencoder + controlnets
        for cell, part in encoders if staged else encoders + denoising:
            load(cell, part)
        for cell, _ in encoders + denoising:
            cell.set_train(False)
        files = stack.pop_all() if staged else None

    def load_rest() -> None:
        with files:
            for cell, part in denoising:
                load(cell, part)

    engine = DiffusionEngine if family is SDXL else LatentDiffusion
    diffusion = engine(unet, vae, texts, config.schedule(), config.scale_factor,
                       [cell for cell, _ in controlnets])
    return ImagePromptModel(family, diffusion, IPAdapterImageEmbedder(encoder, proj), load_rest if staged else None)


def why_incomplete(tensors: dict, sizes: ModelSizes, family: Family) -> str:
    """One line on a file in which a part of a model with its adapter was not found."""
    if family is SD15 and family_of(tensors) is SDXL:
        return "is an SDXL checkpoint, expected SD-1.5; use image_variation_sdxl.py"
    if family is SDXL and any(name.startswith("cond_stage_model.") for name in tensors):
        return "is an SD-1.5 checkpoint, expected SDXL; use image_variation_sd.py"
    if "model.diffusion_model.input_blocks.1.0.in_layers.0.weight" in tensors:
        return f"is an original torch checkpoint, expected a merged one; run {family.tool} {family.base_flag} on it"
    if not sizes.absent():
        return f"holds no IP-Adapter; give --ip_adapter FILE, or run {family.tool} without --skip_ip"
    return f"holds no {', no '.join(sizes.absent())}; expected a file written by {family.tool}"
