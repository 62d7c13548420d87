"""Units of the work users wait for, to be timed: whole commands, loading, a step, pictures, training, merging.

Only what is timed is here. `tools/benchmark.py` runs it, alone or in turns with the same work in diffusers
(tests/record/reference_benchmark.py), each in a process of its own.
"""
from __future__ import annotations

import functools
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Callable, Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor
from PIL import Image

from ip_adapter.benchmark.settings import Setting
from ip_adapter.config import ROOT, InferenceConfig
from ip_adapter.data.dataset import ImageTextDataset
from ip_adapter.data.features import FrozenEncoders
from ip_adapter.data.stream import Batch, Loader, Stream, samples_of
from ip_adapter.demo.stages import DEMO, DEMO_XL
from ip_adapter.families import family_of
from ip_adapter.image_prompt import ImageProjConfig
from ip_adapter.images.preprocess import clip_pixels, latent_mask, latent_pixels
from ip_adapter.inference.inputs import Hint
from ip_adapter.training.step import AdamW, NoisePredictionLoss, OptimizerConfig, TrainStep
from ip_adapter.weights.adapter_file import adapter_parameters
from ip_adapter.weights.loading import ExtraParts, ImagePromptModel, build_model
from ip_adapter.weights.merging import merge
from ip_adapter.weights.parts import ModelSizes
from ldm.checkpoints.file import open_checkpoint
from ldm.model import Shortcuts
from ldm.modules.clip import CLIPImageConfig, CLIPTextConfig
from ldm.modules.unet import UNetConfig
from ldm.parallel import tied_to_parent
from ldm.sampling.ddim import KeptRegion

# Of stand-ins. Those of the demo models begin with 64 channels, not with 32 and then 64: diffusers has but one number.
SIZES = {"1.5": ModelSizes(), "xl": ModelSizes(
    unet=UNetConfig(channel_mult=(1, 2, 4), transformer_depth=(0, 2, 10), middle_depth=10, context_dim=2048,
                    num_heads=-1, num_head_channels=64, use_linear=True, adm_in_channels=2816),
    texts=(CLIPTextConfig(), CLIPTextConfig(1280, 32, 20, 5120, "gelu", 1280)),
    image=CLIPImageConfig(1664, 48, 16, 8192, embed_dim=1280),
    proj=ImageProjConfig(embed_dim=1280, context_dim=2048)),
    "demo": replace(DEMO, unet=replace(DEMO.unet, model_channels=64, channel_mult=(1, 1, 2, 2))),
    "xl_demo": replace(DEMO_XL, unet=replace(DEMO_XL.unet, model_channels=64, channel_mult=(1, 1, 1)))}


def noise_picture(width: int, height: int) -> Image.Image:
    """A seeded picture to be the prompt, the reference and the hint."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def prepare(setting: Setting, weights: Path, config: InferenceConfig, dtype: str, flags: Sequence = (),
            shortcuts: Callable = lambda timesteps: Shortcuts()) -> tuple:
    """Do what comes before the work that is timed.

    Args:
        setting: what is timed.
        weights: merged checkpoint.
        config: of its version.
        dtype: "float32" or "float16".
        flags: more words for a whole command.
        shortcuts: of the sampler's timesteps, what is left out where pictures are made.

    Returns:
        Seconds it took to load, and the unit of work: a function that returns its seconds, and those of its steps.
    """
    if setting.task == "merge":
        return 0.0, functools.partial(_merge, weights)
    if setting.task == "read":
        return 0.0, functools.partial(_read, setting)
    if setting.task == "command":
        graphs = tempfile.TemporaryDirectory()  # gone with the process; the first command compiles, others need not
        return 0.0, functools.partial(_command, setting, weights, flags, graphs)
    begun = time.perf_counter()
    training = setting.task.startswith("train")
    extra = ExtraParts(controlnets=[None] * (setting.task == "controlnet"))
    model = build_model(weights, config.model, dtype, extra, train_adapter=training, family=None)
    loaded = time.perf_counter() - begun
    if setting.task == "load":
        return loaded, lambda: (loaded, loaded)
    if training:
        return loaded, _training(model, setting, dtype)
    model.diffusion.set_size(setting.height, setting.width)
    return loaded, _denoising(model, setting, config, shortcuts)


def peak_memory() -> int:
    """Bytes this process, or the largest it has waited for, has held at most."""
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * 1024


def physical_memory() -> int:
    """Bytes of memory this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _command(setting: Setting, weights: Path, flags: Sequence, graphs: tempfile.TemporaryDirectory) -> tuple:
    """A script from the shell to its pictures on disk: start, load, compile (or take what is compiled) and steps."""
    script = f"image_variation_{'sdxl' if setting.version.startswith('xl') else 'sd'}.py"
    latent = setting.batch_size, 4, setting.height // 8, setting.width // 8
    with tempfile.TemporaryDirectory() as folder:
        picture, noise = Path(folder) / "picture.png", Path(folder) / "noise.npy"
        noise_picture(setting.width, setting.height).save(picture)
        np.save(noise, np.random.default_rng(0).standard_normal(latent, np.float32))
        words = [sys.executable, ROOT / script, "--version", setting.version.removeprefix("xl_"), "--ckpt_path",
                 weights, "--img", picture, "--latents", noise, "--H", setting.height, "--W", setting.width,
                 "--sampling_steps", setting.steps, "--output_path", Path(folder) / "pictures", *flags]
        begun = time.perf_counter()
        subprocess.run([str(word) for word in words], stdout=sys.stderr, check=True, preexec_fn=tied_to_parent(),
                       env={**os.environ, "XDG_CACHE_HOME": graphs.name})
        seconds = time.perf_counter() - begun
    return seconds, seconds


def _merge(weights: Path) -> tuple:
    """All that is merged is in the one file; `skip_ip` takes the adapter from the UNet, which is as large."""
    with open_checkpoint(weights) as file:
        family = family_of(file.tensors)
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        merge(family, weights, weights, None, None, Path(folder) / "merged.ckpt", skip_ip=True)
        seconds = time.perf_counter() - begun
    return seconds, seconds


def _read(setting: Setting) -> tuple:
    """Batches for training from 640x480 JPEG files (quality 90), as often used as it takes, without any network."""
    count, rng = 16, np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for n in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8))
            coarse.resize((640, 480), Image.BICUBIC).save(Path(folder) / f"{n}.jpg", quality=90)
        rows = "".join(f"{n}.jpg,a picture\n" for n in range(count))
        (Path(folder) / "img_txt.csv").write_text("dir,text\n" + rows)
        dataset, stream = ImageTextDataset(Path(folder), setting.height), Stream(count, setting.batch_size, 0)
        with Loader(stream, samples_of(dataset, 0)) as loader:
            batches, begun = iter(loader), time.perf_counter()
            for _ in range(setting.steps):
                next(batches)
            seconds = time.perf_counter() - begun
    return seconds, seconds


def _denoising(model: ImagePromptModel, setting: Setting, config: InferenceConfig, shortcuts: Callable) -> Callable:
    """A unit of any task that denoises: guided, with the image prompt; pictures are decoded, single steps are not."""
    diffusion, s = model.diffusion, config.sampling
    picture = noise_picture(setting.width, setting.height)
    sides = (side.repeated(setting.batch_size)
             for side in model.conditions(picture, [(s.prompt, s.negative_prompt)])[0])
    timesteps = diffusion.timesteps(setting.steps)
    hints = [Hint(picture, s.control_scale, 0.0, 1.0)] * (setting.task == "controlnet")
    denoise = diffusion.denoiser(*sides, s.scale, model.controls(hints, timesteps), shortcuts(timesteps))
    shape = setting.batch_size, diffusion.unet.config.in_channels, setting.height // 8, setting.width // 8
    noise = Tensor(np.random.default_rng(0).standard_normal(shape, np.float32))

    def single_steps() -> tuple:
        begun = time.perf_counter()
        for level in diffusion.levels(setting.steps)[: setting.steps]:
            denoise(noise, level).asnumpy()
        seconds = time.perf_counter() - begun
        return seconds, seconds

    def pictures() -> tuple:
        begun, keep = time.perf_counter(), None
        if setting.task in ("image_to_image", "inpainting"):
            clean = diffusion.encode_image(latent_pixels(picture))
        if setting.task == "inpainting":
            mask = np.zeros((setting.height, setting.width), bool)
            mask[: setting.height // 2] = True
            keep = KeptRegion(clean, noise, latent_mask(mask), diffusion.add_noise)
        sampling = time.perf_counter()
        *_, latents = diffusion.sample(denoise, noise, setting.steps, keep)
        latents.asnumpy()  # Ascend runs behind the host
        sampling = time.perf_counter() - sampling
        diffusion.decode(latents)
        return time.perf_counter() - begun, sampling

    return single_steps if setting.task == "unet_step" else pictures


def _training(model: ImagePromptModel, setting: Setting, dtype: str) -> Callable:
    """A unit of training: the step, and for "train_uncached" what the frozen encoders make of pictures and texts."""
    count, size = setting.batch_size, (setting.height, setting.width)
    picture = noise_picture(setting.width, setting.height)
    image_size = model.embedder.image_encoder.config.image_size
    batch = Batch(0, np.arange(count), np.repeat(latent_pixels(picture), count, 0),
                  np.stack([clip_pixels(picture, image_size)] * count), ["a picture"] * count,
                  np.tile((*size, 0, 0, *size), (count, 1)).astype(np.int32), np.arange(count))
    encoders = FrozenEncoders(model)
    scaled = {"loss_scale": 65536.0, "scale_window": 1000} if dtype == "float16" else {}
    optimizer = AdamW(adapter_parameters(model), OptimizerConfig(**scaled))
    step = TrainStep(NoisePredictionLoss(model.diffusion.unet, model.embedder.image_proj), optimizer)
    kept = encoders.features(batch)
    if setting.task == "train":
        encoders.release()

    def steps() -> tuple:
        begun = time.perf_counter()
        for _ in range(setting.steps):
            features = kept if setting.task == "train" else encoders.features(batch)
            inputs = encoders.inputs(features, batch.positions, 0, (0.05, 0.05, 0.05))
            loss, _ = step(Tensor(1e-4, ms.float32), Tensor(True), True, *inputs)
            loss.asnumpy()
        seconds = time.perf_counter() - begun
        return seconds, seconds

    return steps
