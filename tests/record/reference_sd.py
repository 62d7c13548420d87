"""Make pictures with Stable Diffusion 1.5 and IP-Adapter in torch and diffusers, from the published files.

What diffusers computes here is what the programs of this repository are held against: small networks give the
numbers recorded in tests/data, the real ones give the parity of whole pictures and the time to beat.

Run, in an environment of its own, from the root of the repository:

    pip install torch diffusers transformers accelerate safetensors pillow ftfy
    python tests/record/reference_sd.py --sd v1-5-pruned-emaonly.safetensors \
        --vae sd-vae-ft-mse/diffusion_pytorch_model.safetensors \
        --image_encoder IP-Adapter/image_encoder/model.safetensors \
        --ip_adapter IP-Adapter/ip-adapter_sd15.safetensors \
        --img picture.png --latents noise.npy --output pictures --modules modules.npz --timing

Used with torch 2.13.0, diffusers 0.42.1, transformers 5.23.0. Nothing is downloaded: the sizes of the
networks are read off the shapes of their weights, so smaller networks with the same names work too. What
shapes do not tell is as in SD-1.5: 8 heads in the UNet, 64 channels a head in the text encoder, 16 heads in
the image encoder, 32 groups. Give small networks --threads 1: threads that wait for each other on a busy
machine cost more than they bring, and the last bits of the results depend on their number.

--ref_img starts from a picture (image-to-image) and runs int(sampling_steps * strength) of the steps; with
--ref_mask the white of the mask is repainted and the rest kept (inpainting with the UNet of 4 channels), to the
pixel only with --paste_original. --controlnet, a file in the layout of diffusers, goes with a --control_image;
give both again for several at once. It combines with the others, and --control_start and --control_end are
fractions of the steps that run. These pictures are resized to W x H, whatever their sizes. Nothing is left to
chance: the noise is always that of --latents, and the mode of the VAE's posterior takes the place of a sample.

--modules FILE.npz holds, all float32: text_cond, text_uncond, pixel_values, image_embedding,
image_tokens_cond, image_tokens_uncond, timestep (the first of all steps, whatever --strength), unet_output (of
the noise at this timestep: all pictures without the prompts, then with them, before guidance), latents (final,
as the UNet has them), decoded (first picture, not clamped) and posterior_mean (of --img resized to H x W, not
scaled). With --ref_img also ref_latents (of the picture as the pipeline has it, scaled). With --controlnet also
control_down_0, control_down_1, ... and control_mid (of the first ControlNet, before --control_scale, for the
inputs of unet_output without the image prompt) and unet_control_output (unet_output with these added, scaled).

--timing prints one line of JSON. Weights are mapped into memory, so part of the reading happens at first use:
in encode_seconds and in the first step, which seconds_per_step leaves out, as it does the encoding of --ref_img
(unless there is no other step). total_seconds ends with the last picture written; it has neither the imports
nor --modules in it, and peak_rss_bytes not --modules.
"""

from __future__ import annotations

import argparse
import html
import json
import math
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import ftfy
import numpy as np
import record_tokenizer
import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders import single_file_utils as ldm
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils import load_image
from PIL import Image
from safetensors import safe_open
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

NEGATIVE_PROMPT = "monochrome, lowres, bad anatomy, worst quality, low quality"
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
PIPELINES = {  # without and with ControlNet
    "text": (StableDiffusionPipeline, StableDiffusionControlNetPipeline),
    "image": (StableDiffusionImg2ImgPipeline, StableDiffusionControlNetImg2ImgPipeline),
    "inpainting": (StableDiffusionInpaintPipeline, StableDiffusionControlNetInpaintPipeline),
}


def parse_args() -> argparse.Namespace:
    """Read the command line; one --control_scale becomes as many as there are ControlNets."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sd", required=True, help="SD-1.5 in the original layout, .safetensors")
    parser.add_argument("--vae", help="VAE in the layout of diffusers, in place of the one in --sd")
    parser.add_argument("--image_encoder", required=True, help="CLIP image encoder, transformers layout")
    parser.add_argument("--ip_adapter", required=True, help="published adapter, .safetensors")
    parser.add_argument("--tokenizer", type=Path, default=record_tokenizer.MERGES, help="merge table, gzip")
    parser.add_argument("--img", required=True, help="image prompt")
    parser.add_argument("--prompt", default="best quality, high quality")
    parser.add_argument("--negative_prompt", default=NEGATIVE_PROMPT)
    parser.add_argument("--ip_scale", type=float, default=1.0, help="weight of the image prompt")
    parser.add_argument("--scale", type=float, default=7.5, help="guidance; none at 1 or less")
    parser.add_argument("--sampling_steps", type=int, default=50)
    parser.add_argument("--H", type=int, default=512)
    parser.add_argument("--W", type=int, default=512)
    parser.add_argument("--ref_img", help="picture to start from")
    parser.add_argument("--strength", type=float, default=0.6, help="part of the steps run on --ref_img")
    parser.add_argument("--ref_mask", help="picture, white where --ref_img is repainted")
    parser.add_argument("--paste_original", action="store_true", help="keep the pixels --ref_mask keeps exactly")
    parser.add_argument("--controlnet", action="append", default=[], help="diffusers layout; may be repeated")
    parser.add_argument("--control_image", action="append", default=[], help="one for each --controlnet")
    parser.add_argument("--control_scale", action="append", type=float, help="one for all or one each; 1.0")
    parser.add_argument("--control_start", type=float, default=0.0, help="part of the steps before ControlNet")
    parser.add_argument("--control_end", type=float, default=1.0, help="part of the steps at its end")
    parser.add_argument("--latents", required=True, help="noise, (pictures, 4, H/8, W/8), .npy")
    parser.add_argument("--output", type=Path, required=True, help="folder for 00000.png, 00001.png, ...")
    parser.add_argument("--modules", help="write results of single modules to this .npz")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--timing", action="store_true", help="print times and memory as JSON")
    args = parser.parse_args()
    scales, nets = args.control_scale or [1.0], len(args.controlnet)
    args.control_scale = scales * nets if len(scales) == 1 else scales
    mistakes = {
        "--ref_mask needs --ref_img": args.ref_mask and not args.ref_img,
        "--paste_original needs --ref_mask": args.paste_original and not args.ref_mask,
        "--strength must be at most 1": args.strength > 1,
        "--strength leaves no step": args.ref_img and int(args.sampling_steps * args.strength) < 1,
        "--controlnet and --control_image must be as many": len(args.control_image) != nets,
        "--control_scale must be one or as many as --controlnet": len(args.control_scale) != nets,
    }
    for mistake, made in mistakes.items():
        if made:
            parser.error(mistake)
    return args


def read(path: str, prefix: str = "") -> dict[str, torch.Tensor]:
    """Map the tensors of a file whose names start with `prefix` into memory."""
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]
        return {name: file.get_tensor(name) for name in names if not name.endswith("position_ids")}


def fill(make: type, config: object, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.nn.Module:
    """Build a network and give it exactly these weights.

    Args:
        make: Class of the network.
        config: Its keyword arguments, or a configuration object of transformers.
        weights: All parameters under the names the class gives them.
        dtype: Type of the parameters.
    """
    with init_empty_weights():
        model = make(**config) if isinstance(config, dict) else make(config)
    weights = {name: value.to(dtype) for name, value in weights.items()}
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def count(weights: dict[str, torch.Tensor], pattern: str) -> int:
    """Count i = 0, 1, ... for which a tensor named `pattern.format(i)` exists."""
    i = 0
    while pattern.format(i) in weights:
        i += 1
    return i


def encoder_config(weights: dict[str, torch.Tensor]) -> dict[str, object]:
    """Read what a UNet and a ControlNet have in common off the weights of its encoder, named as in diffusers."""
    levels = count(weights, "down_blocks.{}.resnets.0.conv1.weight")
    attention = [f"down_blocks.{i}.attentions.0.norm.weight" in weights for i in range(levels)]
    context = weights["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"].shape[1]
    return {
        "in_channels": weights["conv_in.weight"].shape[1],
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention],
        "block_out_channels": [len(weights[f"down_blocks.{i}.resnets.0.conv2.bias"]) for i in range(levels)],
        "layers_per_block": count(weights, "down_blocks.0.resnets.{}.conv1.weight"),
        "cross_attention_dim": context,
        "attention_head_dim": 8,  # diffusers' name for the number of heads
    }


def load_unet(path: str, dtype: torch.dtype) -> UNet2DConditionModel:
    """Load the UNet of an original SD-1.5 file."""
    weights = read(path, ldm.LDM_UNET_KEY)
    layers = 0
    while f"{ldm.LDM_UNET_KEY}input_blocks.{layers + 1}.0.out_layers.3.weight" in weights:
        layers += 1
    weights = ldm.convert_ldm_unet_checkpoint(weights, {"layers_per_block": layers})
    config = encoder_config(weights)
    config["out_channels"] = weights["conv_out.weight"].shape[0]
    config["up_block_types"] = [name.replace("Down", "Up") for name in config["down_block_types"][::-1]]
    config["sample_size"] = 64  # of SD-1.5; two of the pipelines do not start without one, none uses it here
    return fill(UNet2DConditionModel, config, weights, dtype)


def hint_config(weights: dict[str, torch.Tensor]) -> dict[str, object]:
    """Read the sizes of a ControlNet's hint embedding off its weights."""
    hint = "controlnet_cond_embedding"
    pairs = count(weights, f"{hint}.blocks.{{}}.bias") // 2  # the second convolution of each widens
    names = [f"{hint}.conv_in.bias", *(f"{hint}.blocks.{2 * i + 1}.bias" for i in range(pairs))]
    return {"conditioning_channels": weights[f"{hint}.conv_in.weight"].shape[1],
            "conditioning_embedding_out_channels": [len(weights[name]) for name in names]}


def load_controlnet(path: str, dtype: torch.dtype) -> ControlNetModel:
    """Load a ControlNet in the layout of diffusers."""
    weights = read(path)
    return fill(ControlNetModel, {**encoder_config(weights), **hint_config(weights)}, weights, dtype)


def load_vae(sd: str, vae: str | None, dtype: torch.dtype) -> AutoencoderKL:
    """Load the VAE of its own file or, without one, of the original SD-1.5 file."""
    if vae:
        weights = read(vae)
        for old, new in OLD_VAE_ATTENTION.items():
            weights = {name.replace(f".0.{old}.", f".0.{new}."): value for name, value in weights.items()}
    else:
        weights = read(sd, "first_stage_model.")
        blocks = [None] * count(weights, "first_stage_model.encoder.down.{}.block.0.conv1.weight")
        sizes = {"down_block_types": blocks, "up_block_types": blocks}
        weights = ldm.convert_ldm_vae_checkpoint(weights, sizes)
    levels = count(weights, "encoder.down_blocks.{}.resnets.0.conv1.weight")
    widths = [len(weights[f"encoder.down_blocks.{i}.resnets.0.conv2.bias"]) for i in range(levels)]
    config = {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": widths,
        "layers_per_block": count(weights, "encoder.down_blocks.0.resnets.{}.conv1.weight"),
        "latent_channels": weights["post_quant_conv.weight"].shape[1],
        "scaling_factor": 0.18215,
    }
    return fill(AutoencoderKL, config, weights, dtype)


def text_config(weights: dict[str, torch.Tensor], activation: str, **more: object) -> CLIPTextConfig:
    """Read the sizes of a text encoder off its weights, named as in transformers."""
    vocabulary, width = weights["embeddings.token_embedding.weight"].shape
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=len(weights["encoder.layers.0.mlp.fc1.bias"]),
        num_hidden_layers=count(weights, "encoder.layers.{}.mlp.fc1.bias"),
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=len(weights["embeddings.position_embedding.weight"]),
        hidden_act=activation,
        **more,
    )


def load_text_encoder(path: str, dtype: torch.dtype) -> CLIPTextModel:
    """Load the text encoder of an original SD-1.5 file."""
    weights = ldm.convert_ldm_clip_checkpoint(read(path, "cond_stage_model."))
    weights = {name.removeprefix("text_model."): value for name, value in weights.items()}
    config = text_config(weights, "quick_gelu")
    return fill(CLIPTextModel, config, weights, dtype)


def load_image_encoder(path: str, dtype: torch.dtype) -> CLIPVisionModelWithProjection:
    """Load the CLIP image encoder."""
    weights = read(path)
    width, _, patch, _ = weights["vision_model.embeddings.patch_embedding.weight"].shape
    patches = len(weights["vision_model.embeddings.position_embedding.weight"]) - 1
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=len(weights["vision_model.encoder.layers.0.mlp.fc1.bias"]),
        num_hidden_layers=count(weights, "vision_model.encoder.layers.{}.mlp.fc1.bias"),
        num_attention_heads=16,
        patch_size=patch,
        image_size=patch * math.isqrt(patches),
        projection_dim=len(weights["visual_projection.weight"]),
        hidden_act="gelu",
        layer_norm_eps=1e-5,
    )
    return fill(CLIPVisionModelWithProjection, config, weights, dtype)


def load_tokenizer(merges: Path) -> CLIPTokenizer:
    """Build the tokenizer from the merge table; what does not fit in 77 tokens is cut."""
    record_tokenizer.MERGES = merges
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = record_tokenizer.build_tokenizer(Path(folder))
    tokenizer.model_max_length = 77
    return tokenizer


def pipeline_class(args: argparse.Namespace) -> type[DiffusionPipeline]:
    """Choose the pipeline by the flags."""
    task = "inpainting" if args.ref_mask else "image" if args.ref_img else "text"
    return PIPELINES[task][bool(args.controlnet)]


def load_adapter(pipe: DiffusionPipeline, path: str, scale: float, dtype: torch.dtype) -> None:
    """Hand a published adapter to diffusers' own loader."""
    adapter = {"image_proj": {}, "ip_adapter": {}}
    for name, value in read(path).items():
        group, name = name.split(".", 1)
        adapter[group][name] = value.to(dtype)
    pipe.load_ip_adapter(adapter, subfolder=None, weight_name=None, image_encoder_folder=None)
    pipe.set_ip_adapter_scale(scale)


def build_pipeline(args: argparse.Namespace) -> DiffusionPipeline:
    """Load all networks and hand the adapter to diffusers' own loader."""
    dtype = getattr(torch, args.dtype)
    image_encoder = load_image_encoder(args.image_encoder, dtype)
    size = image_encoder.config.image_size
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    nets = [load_controlnet(path, dtype) for path in args.controlnet]
    pipe = pipeline_class(args)(
        vae=load_vae(args.sd, args.vae, dtype),
        text_encoder=load_text_encoder(args.sd, dtype),
        tokenizer=load_tokenizer(args.tokenizer),
        unet=load_unet(args.sd, dtype),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=size),
        image_encoder=image_encoder,
        requires_safety_checker=False,
        **({"controlnet": nets} if nets else {}),
    )
    load_adapter(pipe, args.ip_adapter, args.ip_scale, dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def clean(text: str) -> str:
    """Repair a prompt as openai/CLIP does; the tokenizer of transformers does not."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).lower().split())


def load_latents(args: argparse.Namespace) -> torch.Tensor:
    """Read the noise and compare its shape with --H and --W, which diffusers does not."""
    latents = torch.from_numpy(np.load(args.latents)).to(getattr(torch, args.dtype))
    want = (len(latents), 4, args.H // 8, args.W // 8)
    if latents.shape != want:
        raise ValueError(f"{args.latents}: the shape is {tuple(latents.shape)}, not {want}")
    return latents


def leave_nothing_to_chance(pipe: DiffusionPipeline, noise: torch.Tensor) -> None:
    """Make `pipe` draw exactly this noise, and the VAE's posterior its mode.

    The noise cannot be handed over as an argument: image-to-image takes none, and inpainting then ignores the
    strength.
    """

    def randn_tensor(shape: tuple[int, ...], **options) -> torch.Tensor:
        if shape != noise.shape:
            raise ValueError(f"The pipeline draws noise of {tuple(shape)}, not {tuple(noise.shape)}")
        return noise

    sys.modules[type(pipe).__module__].randn_tensor = randn_tensor
    DiagonalGaussianDistribution.sample = lambda posterior, generator=None: posterior.mode()


def load_reference(pipe: DiffusionPipeline, args: argparse.Namespace) -> Image.Image:
    """Read --ref_img and resize it as diffusers does."""
    return pipe.image_processor.resize(load_image(args.ref_img), args.H, args.W)


def pictures_in(pipe: DiffusionPipeline, args: argparse.Namespace) -> dict[str, object]:
    """Read the reference, its mask and the control images, with their settings, into arguments of the pipeline."""
    arguments = {}
    if args.ref_img:  # resized, as StableDiffusionImg2ImgPipeline ignores height and width
        arguments.update(image=load_reference(pipe, args), strength=args.strength)
    if args.ref_mask:
        arguments["mask_image"] = load_image(args.ref_mask)
    if args.controlnet:
        arguments["control_image" if args.ref_img else "image"] = [load_image(path) for path in args.control_image]
        arguments["controlnet_conditioning_scale"] = args.control_scale
        arguments["control_guidance_start"] = args.control_start
        arguments["control_guidance_end"] = args.control_end
    return arguments


def paste_original(
    pipe: StableDiffusionInpaintPipeline | StableDiffusionControlNetInpaintPipeline,
    args: argparse.Namespace,
    pictures: list[Image.Image],
) -> list[Image.Image]:
    """Put the pixels of the reference back where the mask is black."""
    mask = pipe.mask_processor.preprocess(load_image(args.ref_mask), args.H, args.W)[0].permute(1, 2, 0).numpy() >= 0.5
    reference = np.asarray(load_reference(pipe, args))
    return [Image.fromarray(np.where(mask, np.asarray(picture), reference)) for picture in pictures]


def encode(pipe: DiffusionPipeline, args: argparse.Namespace, guided: bool) -> dict[str, object]:
    """Encode both prompts and the picture into arguments of the pipeline.

    Without guidance there is no negative prompt, and the image embedding stands alone.
    """
    text, negative = pipe.encode_prompt(clean(args.prompt), "cpu", 1, guided, clean(args.negative_prompt))
    picture = load_image(args.img)  # turned upright as EXIF says, RGB
    image = pipe.prepare_ip_adapter_image_embeds(picture, None, "cpu", 1, guided)
    return {"prompt_embeds": text, "negative_prompt_embeds": negative, "ip_adapter_image_embeds": image}


def sample(
    pipe: DiffusionPipeline, args: argparse.Namespace, prompts: dict[str, object], pictures: int
) -> tuple[torch.Tensor, float]:
    """Run the DDIM steps; return the final latents and the median time of the steps after the first."""
    ends = []

    def end_of_step(pipe, step, timestep, values):
        ends.append(time.perf_counter())
        return {}

    start = time.perf_counter()
    final = pipe(
        **prompts,
        **pictures_in(pipe, args),
        num_images_per_prompt=pictures,
        num_inference_steps=args.sampling_steps,
        guidance_scale=args.scale,
        height=args.H,
        width=args.W,
        output_type="latent",
        callback_on_step_end=end_of_step,
    ).images
    steps = np.diff(ends) if len(ends) > 1 else [ends[0] - start]
    return final, float(statistics.median(steps))


def control_modules(
    pipe: DiffusionPipeline, args: argparse.Namespace, inputs: tuple[torch.Tensor, ...], image: dict[str, object]
) -> dict[str, torch.Tensor]:
    """Run the first ControlNet, and the UNet with what it gives.

    Args:
        pipe: Pipeline with ControlNets.
        args: Command line.
        inputs: Latents, timestep and text embeddings.
        image: The image prompt for the UNet.
    """
    hint = pipe.control_image_processor.preprocess(load_image(args.control_image[0]), args.H, args.W)
    hint = hint.to(inputs[0].dtype).expand(len(inputs[0]), -1, -1, -1)
    down, mid = pipe.controlnet.nets[0](*inputs, hint, return_dict=False)
    scale = args.control_scale[0]
    output = pipe.unet(
        *inputs,
        added_cond_kwargs=image,
        down_block_additional_residuals=[value * scale for value in down],
        mid_block_additional_residual=mid * scale,
    ).sample
    tensors = {f"control_down_{i}": value for i, value in enumerate(down)}
    return {**tensors, "control_mid": mid, "unet_control_output": output}


def record_modules(
    pipe: DiffusionPipeline,
    args: argparse.Namespace,
    noise: torch.Tensor,
    results: dict[str, torch.Tensor],
) -> None:
    """Run single modules and write what they give, and `results`, to --modules."""
    prompts = encode(pipe, args, guided=True)
    text, negative = prompts["prompt_embeds"], prompts["negative_prompt_embeds"]
    image = prompts["ip_adapter_image_embeds"]
    uncond, cond = pipe.unet.encoder_hid_proj(image)[0].flatten(1, 2).chunk(2)
    pipe.scheduler.set_timesteps(args.sampling_steps)
    inputs = (
        torch.cat([noise] * 2),
        pipe.scheduler.timesteps[0],
        torch.cat([negative, text]).repeat_interleave(len(noise), 0),
    )
    image_prompt = {"image_embeds": [image[0].repeat_interleave(len(noise), 0)]}
    picture = load_image(args.img)
    resized = np.asarray(picture.resize((args.W, args.H), Image.Resampling.BICUBIC), np.float32) / 127.5 - 1
    posterior = pipe.vae.encode(torch.from_numpy(resized).permute(2, 0, 1)[None].to(noise.dtype)).latent_dist
    tensors = {
        **results,
        "text_cond": text,
        "text_uncond": negative,
        "pixel_values": pipe.feature_extractor(picture, return_tensors="pt").pixel_values,
        "image_embedding": image[0][1],
        "image_tokens_cond": cond,
        "image_tokens_uncond": uncond,
        "timestep": pipe.scheduler.timesteps[0],
        "unet_output": pipe.unet(*inputs, added_cond_kwargs=image_prompt).sample,
        "posterior_mean": posterior.mean,
    }
    if args.ref_img:
        reference = pipe.image_processor.preprocess(load_reference(pipe, args)).to(noise.dtype)
        tensors["ref_latents"] = pipe.vae.config.scaling_factor * pipe.vae.encode(reference).latent_dist.mode()
    if args.controlnet:
        tensors.update(control_modules(pipe, args, inputs, image_prompt))
    np.savez(args.modules, **{name: value.float().numpy() for name, value in tensors.items()})


@torch.no_grad()
def main() -> None:
    """Make the pictures; print times and record modules when asked to."""
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    noise = load_latents(args)
    marks = [time.perf_counter()]
    pipe = build_pipeline(args)
    leave_nothing_to_chance(pipe, noise)
    marks.append(time.perf_counter())
    prompts = encode(pipe, args, guided=args.scale > 1)
    marks.append(time.perf_counter())
    latents, seconds_per_step = sample(pipe, args, prompts, len(noise))
    marks.append(time.perf_counter())
    decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    marks.append(time.perf_counter())
    args.output.mkdir(parents=True, exist_ok=True)
    pictures = pipe.image_processor.postprocess(decoded, output_type="pil")
    if args.paste_original:
        pictures = paste_original(pipe, args, pictures)
    for i, picture in enumerate(pictures):
        picture.save(args.output / f"{i:05d}.png")
    if args.timing:
        times = {
            "load_seconds": marks[1] - marks[0],
            "encode_seconds": marks[2] - marks[1],
            "seconds_per_step": seconds_per_step,
            "decode_seconds": marks[4] - marks[3],
            "total_seconds": time.perf_counter() - marks[0],
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        print(json.dumps(times))
    if args.modules:
        record_modules(pipe, args, noise, {"latents": latents, "decoded": decoded[:1]})


if __name__ == "__main__":
    main()
