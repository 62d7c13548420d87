"""The work of tools/benchmark.py in torch and diffusers, for its --against: once for each line of standard input.

It is started by that tool, in the environment of reference_sd.py, on the same stand-ins:

    python tools/benchmark.py --task unet_step --against diffusers --torch_python TORCH_PYTHON --standins runs/standins

Training is the step of tencent-ailab/IP-Adapter: tutorial_train.py and tutorial_train_sdxl.py: gradients of the adapter
and AdamW, with pictures and captions encoded anew at every step. It caches nothing, so it is the same for both of ours.
"""
from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Callable

import numpy as np
import record_tokenizer
import reference_sd
import reference_sdxl
import torch
from diffusers import DDPMScheduler
from PIL import Image

PROMPT, NEGATIVE = "best quality, high quality", reference_sd.NEGATIVE_PROMPT


def main() -> None:
    """Parse the flags, build, work when told to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for flag in ("--task", "--version"):
        parser.add_argument(flag, required=True)
    for flag in ("--batch_size", "--height", "--width", "--steps", "--threads", "--num_heads", "--num_head_channels",
                 "--norm_groups"):
        parser.add_argument(flag, type=int, required=True)
    parser.add_argument("--standins", type=Path, required=True)
    args = parser.parse_args()
    args.xl = args.version.startswith("xl")
    if args.threads:
        torch.set_num_threads(args.threads)
    begun = time.perf_counter()
    work = build(args)
    print(json.dumps({"load_seconds": time.perf_counter() - begun}), flush=True)
    while True:
        try:
            input()
        except EOFError:
            return
        seconds, stepping = work()
        peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * 1024
        print(json.dumps({"seconds": seconds, "stepping": stepping, "peak_memory_bytes": peak}), flush=True)


def build(args: argparse.Namespace) -> Callable:
    """Load what the task needs: a function that returns its seconds, and those of its steps."""
    folder = args.standins
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (args.height, args.width, 3), np.uint8))
    path = folder / "picture.png"
    picture.save(path)
    base, adapter, control = (("sd_xl_base_1.0", "ip-adapter_sdxl", "controlnet-depth-sdxl-1.0") if args.xl else
                              ("v1-5-pruned-emaonly", "ip-adapter_sd15", "control_v11f1p_sd15_depth"))
    net = str(folder / control / "diffusion_pytorch_model.safetensors")
    with_net = args.task == "controlnet"
    shared = SimpleNamespace(
        image_encoder=str(folder / "IP-Adapter" / "image_encoder" / "model.safetensors"), dtype="float32",
        ip_adapter=str(folder / "IP-Adapter" / f"{adapter}.safetensors"), tokenizer=record_tokenizer.MERGES,
        img=str(path), prompt=PROMPT, negative_prompt=NEGATIVE, ip_scale=1.0, strength=1.0,
        head_channels=args.num_head_channels,
        vae=None, ref_img=None, ref_mask=None, base=str(folder / f"{base}.safetensors"),
        sd=str(folder / f"{base}.safetensors"),
        controlnet=(net if args.xl else [net]) if with_net else None if args.xl else [])
    if args.task.startswith("train"):
        return training(args, shared, picture)
    if args.task == "command":
        return lambda: command(args, shared)
    if args.xl:
        with torch.no_grad():
            given = reference_sdxl.encode(shared)
        pipe = pipeline(args, shared)
    else:
        if args.task == "image_to_image":
            shared.ref_img = str(path)
        if args.task == "inpainting":
            shared.ref_img = shared.ref_mask = str(path)
        pipe = pipeline(args, shared)
        with torch.no_grad():
            prompts = pipe.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE)
            embedding, zeros = pipe.encode_image(picture, "cpu", 1)
        given = {"prompt_embeds": prompts[0], "negative_prompt_embeds": prompts[1],
                 "ip_adapter_image_embeds": [torch.stack([zeros, embedding])]}
    return single_steps(args, pipe, given) if args.task == "unet_step" else pictures(args, pipe, given, picture)


def command(args: argparse.Namespace, shared: SimpleNamespace) -> tuple:
    """The script that makes the same pictures: start, load and steps."""
    noise = args.standins / "noise.npy"
    shape = args.batch_size, 4, args.height // 8, args.width // 8
    np.save(noise, np.random.default_rng(0).standard_normal(shape, np.float32))
    if args.xl:
        flags = {"--base": shared.base, "--sample_step": args.steps, "--head_channels": args.num_head_channels}
    else:
        flags = {"--sd": shared.base, "--sampling_steps": args.steps,
                 "--threads": args.threads or torch.get_num_threads()}
    flags.update({"--image_encoder": shared.image_encoder, "--ip_adapter": shared.ip_adapter, "--img": shared.img,
                  "--latents": noise, "--H": args.height, "--W": args.width, "--output": args.standins / "pictures"})
    words = [sys.executable, (reference_sdxl if args.xl else reference_sd).__file__]
    words += [str(word) for pair in flags.items() for word in pair]
    begun = time.perf_counter()
    subprocess.run(words, stdout=sys.stderr, check=True)
    seconds = time.perf_counter() - begun
    return seconds, seconds


def pipeline(args: argparse.Namespace, shared: SimpleNamespace):
    """The family's pipeline, with heads and groups that shapes of tensors do not tell, as the demo models have."""
    pipe = (reference_sdxl if args.xl else reference_sd).build_pipeline(shared)
    networks = [net for net in (pipe.unet, pipe.vae, getattr(pipe, "controlnet", None)) if net is not None]
    for name, module in (pair for net in networks for pair in net.named_modules()):
        if isinstance(module, torch.nn.GroupNorm):
            module.num_groups = args.norm_groups
        if args.num_heads > 0 and name.endswith(("attn1", "attn2")):
            module.heads = args.num_heads
    return pipe


def single_steps(args: argparse.Namespace, pipe, given: dict) -> Callable:
    """Guided steps of the UNet without a sampler."""
    n, pair = args.batch_size, ("negative_prompt_embeds", "prompt_embeds")
    text = torch.cat([given[name].expand(n, -1, -1) for name in pair])
    added = {"image_embeds": [given["ip_adapter_image_embeds"][0].repeat_interleave(n, 0)]}
    if args.xl:
        sizes = torch.tensor([[args.height, args.width, 0, 0, args.height, args.width]] * 2 * n, dtype=torch.float32)
        pooled = torch.cat([given[name].expand(n, -1) for name in ("negative_pooled_prompt_embeds",
                                                                   "pooled_prompt_embeds")])
        added.update(text_embeds=pooled, time_ids=sizes)
    x = torch.randn(2 * n, 4, args.height // 8, args.width // 8)
    pipe.scheduler.set_timesteps(max(args.steps, 2))

    @torch.no_grad()
    def work() -> tuple:
        begun = time.perf_counter()
        for t in pipe.scheduler.timesteps[: args.steps]:
            uncond, cond = pipe.unet(x, t, text, added_cond_kwargs=added).sample.chunk(2)
            uncond + 7.5 * (cond - uncond)
        seconds = time.perf_counter() - begun
        return seconds, seconds

    return work


def pictures(args: argparse.Namespace, pipe, given: dict, picture: Image.Image) -> Callable:
    """Whole pictures; `steps` of them are run, so strength is 1."""
    words = {"image_to_image": {"image": picture, "strength": 1.0},
             "inpainting": {"image": picture, "strength": 1.0, "mask_image": picture},
             "controlnet": {"image": picture if args.xl else [picture]}}.get(args.task, {})
    if args.task != "image_to_image":
        words.update(height=args.height, width=args.width)

    @torch.no_grad()
    def work() -> tuple:
        ends, begun = [], time.perf_counter()

        def ended(pipe, step, timestep, values):
            ends.append(time.perf_counter())
            return {}

        pipe(**given, **words, num_images_per_prompt=args.batch_size, num_inference_steps=args.steps,
             guidance_scale=7.5, callback_on_step_end=ended)
        steps = np.diff(ends) if len(ends) > 1 else [ends[0] - begun]
        return time.perf_counter() - begun, float(np.mean(steps)) * args.steps

    return work


def training(args: argparse.Namespace, shared: SimpleNamespace, picture: Image.Image) -> Callable:
    """The official scripts' step."""
    n, sizes = args.batch_size, [[args.height, args.width, 0, 0, args.height, args.width]]
    if args.xl:
        pipe, texts, images = (pipeline(args, shared),
                               reference_sdxl.text_pipeline(shared), reference_sdxl.image_pipeline(shared))

        def text() -> tuple:
            states, _, pooled, _ = texts.encode_prompt(["a picture"] * n, device="cpu",
                                                       do_classifier_free_guidance=False)
            return states, {"text_embeds": pooled, "time_ids": torch.tensor(sizes * n, dtype=torch.float32)}
    else:
        pipe = images = pipeline(args, shared)

        def text() -> tuple:
            tokens = pipe.tokenizer(["a picture"] * n, padding="max_length", return_tensors="pt").input_ids
            return pipe.text_encoder(tokens)[0], {}

    unet = pipe.unet.train()
    trained = list(unet.encoder_hid_proj.parameters())
    for processor in unet.attn_processors.values():
        if isinstance(processor, torch.nn.Module):
            trained += list(processor.parameters())
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01)
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")

    def work() -> tuple:
        begun = time.perf_counter()
        for _ in range(args.steps):
            with torch.no_grad():
                pixels = pipe.image_processor.preprocess([picture] * n)
                latents = pipe.vae.encode(pixels).latent_dist.sample() * pipe.vae.config.scaling_factor
                clip = images.feature_extractor([picture] * n, return_tensors="pt").pixel_values
                embedding = images.image_encoder(clip).image_embeds
                states, added = text()
            noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (n,))
            noisy = schedule.add_noise(latents, noise, timesteps)
            added["image_embeds"] = [embedding[:, None]]
            predicted = unet(noisy, timesteps, states, added_cond_kwargs=added).sample
            loss = torch.nn.functional.mse_loss(predicted.float(), noise.float())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()
        seconds = time.perf_counter() - begun
        return seconds, seconds

    return work


if __name__ == "__main__":
    main()
