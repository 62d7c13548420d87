"""Make SDXL pictures with an IP-Adapter, with or without a ControlNet, by diffusers: what ours are compared with.

TORCH_PYTHON tests/record/reference_sdxl.py --base sd_xl_base_1.0.safetensors --image_encoder model.safetensors \
    --ip_adapter ip-adapter_sdxl.safetensors --img photo.png --latents noise.npy --H 512 --W 512 --output out

Weights are the published files, or stand-ins in their layout. Sizes are read off the tensors, but for the channels of a
head. Needs torch 2.13.0, diffusers 0.42.1, transformers 5 and ftfy; recorded for the tests by record_sdxl.sh.
"""
from __future__ import annotations

import argparse
import re
import resource
import time
from pathlib import Path

import numpy as np
import record_tokenizer
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    EulerDiscreteScheduler,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders import single_file_utils as ldm
from diffusers.utils import load_image
from reference_sd import (
    NEGATIVE_PROMPT,
    clean,
    count,
    encoder_config,
    fill,
    hint_config,
    load_adapter,
    load_image_encoder,
    load_tokenizer,
    load_vae,
    read,
    text_config,
)
from transformers import CLIPImageProcessorPil, CLIPTextModel, CLIPTextModelWithProjection

DTYPE = torch.float32
CLIP_L, BIG_G = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
OPEN_CLIP = ((r"^transformer\.resblocks\.", "encoder.layers."), (r"\.ln_([12])\.", r".layer_norm\1."),
             (r"\.mlp\.c_fc\.", ".mlp.fc1."), (r"\.mlp\.c_proj\.", ".mlp.fc2."), (r"\.attn\.", ".self_attn."),
             (r"^token_embedding\.", "embeddings.token_embedding."), (r"^ln_final\.", "final_layer_norm."),
             (r"^positional_embedding$", "embeddings.position_embedding.weight"))


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("base", "image_encoder", "ip_adapter", "img", "latents"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--vae", help="in place of the one in --base")
    parser.add_argument("--controlnet", help="diffusers layout")
    parser.add_argument("--control_image")
    parser.add_argument("--control_scale", type=float, default=0.7)
    parser.add_argument("--tokenizer", type=Path, default=record_tokenizer.MERGES, help="merge table, gzip")
    parser.add_argument("--prompt", default="best quality, high quality")
    parser.add_argument("--negative_prompt", default=NEGATIVE_PROMPT)
    parser.add_argument("--ip_scale", type=float, default=1.0)
    parser.add_argument("--guidance_scale", type=float, default=5.0)
    parser.add_argument("--sample_step", type=int, default=30)
    parser.add_argument("--H", type=int, default=1024)
    parser.add_argument("--W", type=int, default=1024)
    parser.add_argument("--head_channels", type=int, default=64)
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def network_config(weights: dict, head_channels: int) -> dict:
    """What UNet and ControlNet have in common, read off their encoder."""
    config = encoder_config(weights)
    widths = config["block_out_channels"]
    blocks = "down_blocks.{}.attentions.0.transformer_blocks.{{}}.norm1.weight"
    depths = [max(1, count(weights, blocks.format(i))) for i in range(len(widths))]
    config.update(attention_head_dim=[max(1, width // head_channels) for width in widths],
                  transformer_layers_per_block=depths, use_linear_projection=True, addition_embed_type="text_time",
                  addition_time_embed_dim=256,
                  projection_class_embeddings_input_dim=weights["add_embedding.linear_1.weight"].shape[1])
    return config


def load_unet(path: str, head_channels: int) -> UNet2DConditionModel:
    """The UNet of an original SDXL file."""
    weights = ldm.convert_ldm_unet_checkpoint(
        read(path, ldm.LDM_UNET_KEY), {"layers_per_block": 2, "addition_embed_type": "text_time"})
    config = network_config(weights, head_channels)
    config["up_block_types"] = [name.replace("Down", "Up") for name in config["down_block_types"][::-1]]
    config.update(out_channels=weights["conv_out.weight"].shape[0], sample_size=128)
    return fill(UNet2DConditionModel, config, weights, DTYPE)


def load_controlnet(path: str, head_channels: int) -> ControlNetModel:
    """A ControlNet of SDXL in the layout of diffusers."""
    weights = read(path)
    config = {**network_config(weights, head_channels), **hint_config(weights)}
    return fill(ControlNetModel, config, weights, DTYPE)


def load_text_encoders(path: str) -> tuple:
    """CLIP-L, and OpenCLIP's ViT-bigG with its projection."""
    small = {name.removeprefix(CLIP_L + "text_model."): value for name, value in read(path, CLIP_L).items()}
    large = {}
    for name, value in read(path, BIG_G).items():
        name = name.removeprefix(BIG_G)
        for pattern, replacement in OPEN_CLIP:
            name = re.sub(pattern, replacement, name)
        if "in_proj_" in name:
            for part, third in zip("qkv", value.chunk(3)):
                large[name.replace("in_proj_", f"{part}_proj.")] = third
        elif name not in ("logit_scale", "text_projection"):
            large[name] = value
    projection = read(path, BIG_G + "text_projection")[BIG_G + "text_projection"]
    first = fill(CLIPTextModel, text_config(small, "quick_gelu"), small, DTYPE)
    config = text_config(large, "gelu", projection_dim=projection.shape[1])
    named = {f"text_model.{name}": value for name, value in large.items()}
    named["text_projection.weight"] = projection.T.contiguous()
    return first, fill(CLIPTextModelWithProjection, config, named, DTYPE)


def text_pipeline(args: argparse.Namespace) -> StableDiffusionXLPipeline:
    """A pipeline that encodes texts."""
    first, second = load_text_encoders(args.base)
    tokenizer, tokenizer_2 = load_tokenizer(args.tokenizer), load_tokenizer(args.tokenizer)
    tokenizer_2.pad_token = "!"  # id 0
    return StableDiffusionXLPipeline(None, first, second, tokenizer, tokenizer_2, None, None, add_watermarker=False,
                                     force_zeros_for_empty_prompt=False)


def image_pipeline(args: argparse.Namespace) -> StableDiffusionXLPipeline:
    """A pipeline that encodes picture prompts."""
    image_encoder = load_image_encoder(args.image_encoder, DTYPE)
    size = image_encoder.config.image_size
    return StableDiffusionXLPipeline(
        None, None, None, None, None, None, None, image_encoder=image_encoder, add_watermarker=False,
        feature_extractor=CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=size))


def encode(args: argparse.Namespace) -> dict:
    """What the pipeline is given in place of texts and picture, so that the encoders are gone when the UNet is read."""
    names = "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"
    given = dict(zip(names, text_pipeline(args).encode_prompt(
        clean(args.prompt), device="cpu", num_images_per_prompt=1, negative_prompt=clean(args.negative_prompt))))
    embedding, zeros = image_pipeline(args).encode_image(load_image(args.img), "cpu", 1)
    return {**given, "ip_adapter_image_embeds": [torch.stack([zeros, embedding])]}


def build_pipeline(args: argparse.Namespace) -> StableDiffusionXLPipeline:
    """UNet, autoencoder and ControlNet, with the adapter loaded by diffusers' own loader."""
    vae: AutoencoderKL = load_vae(args.base, args.vae, DTYPE)
    vae.register_to_config(scaling_factor=0.13025)
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                       timestep_spacing="leading", steps_offset=1)
    make = StableDiffusionXLControlNetPipeline if args.controlnet else StableDiffusionXLPipeline
    more = {"controlnet": load_controlnet(args.controlnet, args.head_channels)} if args.controlnet else {}
    pipe = make(vae=vae, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, scheduler=scheduler,
                unet=load_unet(args.base, args.head_channels), add_watermarker=False, **more)
    load_adapter(pipe, args.ip_adapter, args.ip_scale, DTYPE)
    return pipe


def main() -> None:
    """Make a picture for each starting noise."""
    args = parse_args()
    with torch.no_grad():
        given = encode(args)
    pipe = build_pipeline(args)
    latents = torch.from_numpy(np.load(args.latents))
    args.output.mkdir(parents=True, exist_ok=True)
    words = {}
    if args.controlnet:
        words = {"image": load_image(args.control_image), "controlnet_conditioning_scale": args.control_scale}
    with torch.no_grad():
        for n, noise in enumerate(latents):
            started = time.time()
            picture = pipe(height=args.H, width=args.W, num_inference_steps=args.sample_step,
                           latents=noise[None].clone(), guidance_scale=args.guidance_scale, callback_on_step_end=said,
                           **given, **words).images[0]
            picture.save(args.output / f"{n:05d}.png")
            print(f"picture {n}: {time.time() - started:.1f} s, peak "
                  f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


def said(pipe: StableDiffusionXLPipeline, step: int, timestep: torch.Tensor, values: dict) -> dict:
    """Print when a step is done."""
    print(f"step {step + 1} at {time.perf_counter():.1f} s", flush=True)
    return values


if __name__ == "__main__":
    main()
