"""The two families of models as values: under which names their parts stand in files, and what users call them."""
from __future__ import annotations

import re
from dataclasses import dataclass

from gm.names import CONTROLNET_SDXL, TEXT_G_SDXL, TEXT_G_TORCH, TEXT_L_SDXL, TEXT_L_TORCH, UNET_SDXL
from ip_adapter.names import IMAGE_ATTENTION, image_encoder_mindspore, image_proj_mindspore
from ldm.checkpoints.layout import Layout
from ldm.checkpoints.names import (
    CONTROLNET_PREFIX,
    CONTROLNET_SD15,
    TEXT_SD15,
    TEXT_TORCH,
    UNET_SD15,
    UNET_TORCH,
    VAE_MINDSPORE,
    VAE_TORCH,
)


@dataclass(frozen=True)
class Family:
    """Where the parts of a model are in its files, and how messages name them.

    Attributes:
        name: of the family.
        mindspore: layouts of UNet, autoencoder and text encoders in MindSpore files.
        torch: the same in the original torch file.
        controlnet: layout of the ControlNet in a merged file.
        embedder: prefix of image encoder and projector in a merged file.
        activations: of the text encoders.
        carried: names of a text encoder's tensors that no network needs, but files of the family hold.
        float32_vae: whether the autoencoder overflows in float16.
        base: what a whole base model is called.
        base_flag: of the merge tool that names it.
        tool: that merges its files.
        adapter: an example of a published adapter, and of a finetuned one.
        finetuned: where a training writes its adapters in its output folder, {} being the step.
        controlnets: whose ControlNets fit.
    """

    name: str
    mindspore: tuple
    torch: tuple
    controlnet: Layout
    embedder: str
    activations: tuple
    carried: tuple
    float32_vae: bool
    base: str
    base_flag: str
    tool: str
    adapter: str
    finetuned: str
    controlnets: str

    @property
    def image_encoder(self) -> Layout:
        """The image encoder in a merged file."""
        return image_encoder_mindspore(self.embedder)

    @property
    def image_proj(self) -> Layout:
        """The projector in a merged or finetuned file."""
        return image_proj_mindspore(self.embedder)

    @property
    def adapter_names(self) -> str:
        """Pattern of the names of an adapter in a merged file."""
        return rf"{IMAGE_ATTENTION}|^{re.escape(self.embedder)}image_proj\."

    @property
    def merged_extras(self) -> str:
        """Pattern of the names a merged file holds beyond its base; it may be merged again."""
        return rf"{IMAGE_ATTENTION}|^{re.escape(self.embedder)}|^{re.escape(CONTROLNET_PREFIX)}"


SD15 = Family(
    "SD-1.5", (UNET_SD15, VAE_MINDSPORE, TEXT_SD15), (UNET_TORCH, VAE_TORCH, TEXT_TORCH), CONTROLNET_SD15,
    embedder="embedder.", activations=("quick_gelu",), carried=(), float32_vae=False,
    base="sd_v1.5-d0ab7146.ckpt or v1-5-pruned-emaonly.safetensors", base_flag="--sd",
    tool="tools/merge_ckpts_sd.py", adapter="ip-adapter_sd15.safetensors or a finetuned sd-N.ckpt",
    finetuned="ckpt/sd-{}",
    controlnets="lllyasviel's in either layout")
SDXL = Family(
    "SDXL", (UNET_SDXL, VAE_MINDSPORE, TEXT_L_SDXL, TEXT_G_SDXL),
    (UNET_TORCH, VAE_TORCH, TEXT_L_TORCH, TEXT_G_TORCH), CONTROLNET_SDXL,
    embedder="conditioner.embedders.2.", activations=("quick_gelu", "gelu"), carried=("logit_scale",),
    float32_vae=True,
    base="sd_xl_base_1.0_ms.ckpt or sd_xl_base_1.0.safetensors", base_flag="--sd_xl_base",
    tool="tools/merge_ckpts_sdxl.py",
    adapter="ip-adapter_sdxl.safetensors or a finetuned SDXL-base-1.0-N_ip_only.ckpt",
    finetuned="weights/SDXL-base-1.0-{}_ip_only",
    controlnets="one of diffusers' for SDXL, such as controlnet-depth-sdxl-1.0")


def family_of(tensors: dict) -> Family:
    """The family of a whole model, or of what might be one: SDXL where there are text encoders under its names."""
    return SDXL if any(name.startswith("conditioner.") for name in tensors) else SD15
