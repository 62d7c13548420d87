"""The training step of the official IP-Adapter script in torch and diffusers, timed: the step ours is held against.

What a step does is that of tencent-ailab/IP-Adapter: tutorial_train.py: pictures through the VAE's and CLIP's encoder,
captions through the text encoder, nothing cached, then UNet, loss, gradients of the adapter and AdamW. Run in the
environment of reference_sd.py, from the root of the repository:

    python tests/record/reference_training.py --sd v1-5-pruned-emaonly.safetensors \
        --image_encoder IP-Adapter/image_encoder/model.safetensors --ip_adapter IP-Adapter/ip-adapter_sd15.safetensors \
        --img picture.png --batch 2 --size 512 --steps 3

It prints one line of JSON: seconds of every step after the first, and their median.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import record_tokenizer
import reference_sd
import torch
from diffusers import DDPMScheduler
from diffusers.utils import load_image


def main() -> None:
    """Parse the flags, build, time."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for flag in ("--sd", "--image_encoder", "--ip_adapter", "--img"):
        parser.add_argument(flag, required=True)
    parser.add_argument("--tokenizer", type=Path, default=record_tokenizer.MERGES, help="merge table, gzip")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3, help="timed, after one that is not")
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.vae, args.dtype, args.controlnet, args.ref_img, args.ref_mask = None, "float32", [], None, None
    args.ip_scale = 1.0
    pipe = reference_sd.build_pipeline(args)
    unet = pipe.unet.train()
    trained = list(unet.encoder_hid_proj.parameters())
    for processor in unet.attn_processors.values():
        if isinstance(processor, torch.nn.Module):
            trained += list(processor.parameters())
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01)
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    picture, seconds = load_image(args.img), []
    for _ in range(args.steps + 1):
        begun = time.perf_counter()
        images = [picture.resize((args.size, args.size)) for _ in range(args.batch)]
        with torch.no_grad():
            pixels = pipe.image_processor.preprocess(images)
            latents = pipe.vae.encode(pixels).latent_dist.sample() * pipe.vae.config.scaling_factor
            clip = pipe.feature_extractor([picture] * args.batch, return_tensors="pt").pixel_values
            embedding = pipe.image_encoder(clip).image_embeds
            tokens = pipe.tokenizer(["a picture"] * args.batch, padding="max_length", return_tensors="pt").input_ids
            text = pipe.text_encoder(tokens)[0]
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (args.batch,))
        noisy = schedule.add_noise(latents, noise, timesteps)
        predicted = unet(noisy, timesteps, text, added_cond_kwargs={"image_embeds": [embedding[:, None]]}).sample
        loss = torch.nn.functional.mse_loss(predicted.float(), noise.float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        seconds.append(time.perf_counter() - begun)
    seconds = [round(s, 3) for s in seconds[1:]]
    print(json.dumps({"batch": args.batch, "size": args.size, "trained": sum(p.numel() for p in trained),
                      "seconds": seconds, "median": statistics.median(seconds)}))


if __name__ == "__main__":
    main()
