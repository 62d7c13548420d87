"""One run of an inference script: which pictures, from which noise, saved where, reported how."""
from __future__ import annotations

import argparse
import logging
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterable, Iterator

import numpy as np
from mindspore import Tensor
from PIL import Image
from tqdm import tqdm

from gm.conditioner import Sizes
from ip_adapter.config import InferenceConfig
from ip_adapter.families import SDXL
from ip_adapter.images.saving import grid, save_png
from ip_adapter.inference.graph_cache import RunGraphs, run_graphs, use_graphs
from ip_adapter.inference.inputs import Hint, Inputs, timesteps_between
from ip_adapter.inference.metadata import Metadata, as_typed
from ip_adapter.weights.files import default_weights, extra_parts
from ip_adapter.weights.loading import ImagePromptModel, build_model
from ldm.device import default_mode
from ldm.errors import UserError
from ldm.model import Shortcuts

log = logging.getLogger(__name__)

MAX_LATENT = 1000  # of noise of unit variance; far more overflows float16 and makes a flat image
# From so many positions of latents on, over all steps, graphs of denoiser and decoder save more time on the CPU than
# they take to compile: half a minute for SD-1.5, one for SDXL, and a third of each step. Eight guided steps of 512x512
# have them.
COMPILED_POSITIONS = 1 << 16


@dataclass
class Batch:
    """Pictures made together.

    Attributes:
        prompt: of all of them.
        negative_prompt: of all of them.
        sides: what is asked for, `ImagePromptModel.conditions` of one picture.
        seeds: one for each picture.
        noise: (B, 4, H / 8, W / 8) float32, unit variance.
    """

    prompt: str
    negative_prompt: str
    sides: tuple
    seeds: list
    noise: Tensor
    _generators: list = field(default_factory=list)

    def fresh_noise(self) -> Tensor:
        """More noise like `noise`, of each picture's own, for samplers that add some at every step."""
        if not self._generators:
            self._generators = [np.random.default_rng([seed, 1]) for seed in self.seeds]
        shape = self.noise.shape[1:]
        return Tensor(np.stack([generator.standard_normal(shape, np.float32) for generator in self._generators]))


class Run:
    """Plans the pictures of a run, counts its time and writes what it makes.

    Args:
        args: parsed flags of `ip_adapter.cli.inference.inference_parser`, the size filled in by
            `ip_adapter.inference.inputs.open_inputs`.
        model_name: for the metadata.
        weights: the checkpoint used, for the metadata.
        timesteps: those of the sampler.
        latent_channels: channels of a latent.

    Raises:
        UserError: prompt files or --latents do not fit.
    """

    def __init__(self, args: argparse.Namespace, model_name: str, weights: Path, timesteps: np.ndarray,
                 latent_channels: int = 4):
        self.args, self.name, self.weights, self.timesteps = args, model_name, weights, timesteps
        self.pairs = list(zip(*prompt_pairs(args)))
        self.shape = (latent_channels, args.H // 8, args.W // 8)
        self.latents = None if args.latents is None else read_latents(args.latents, self.shape)
        if args.n_samples is None:
            args.n_samples = self._default_samples()
        self.total = len(self.pairs) * args.n_iter * args.n_samples
        if self.latents is not None and len(self.latents) != self.total:
            raise UserError(f"--latents {args.latents}: holds {len(self.latents)} starting points, expected "
                            f"{self.total} (--n_samples x --n_iter x prompts)")
        files = {"ckpt_path": [weights], "ip_adapter": [args.ip_adapter], "vae": [args.vae],
                 "controlnet": args.controlnet}
        self.metadata = Metadata(args, model_name, {flag: [path for path in paths if path]
                                                    for flag, paths in files.items()})
        self.conditions: list = []
        self.compiled, self.graphs, self.last_grid = False, None, None
        self.made, self.steps, self.sampling_seconds, self.started = 0, 0, 0.0, time.time()

    def _default_samples(self) -> int:
        if self.latents is None:
            return self.args.default_samples
        return max(1, len(self.latents) // (len(self.pairs) * self.args.n_iter))

    def plan_graphs(self, model: ImagePromptModel) -> None:
        """Decide what runs as graphs, and which: those a run like this one has left, or new ones.

        Raises:
            UserError: they cannot be kept in the folder of --graph_cache.
        """
        graphs = run_graphs(model, self.args)
        self.compiled = self._compiles(graphs)
        if graphs and (self.compiled or self.args.ms_mode == 0 or self.args.graph_cache is not None):
            self.graphs = use_graphs(graphs, self.args)

    def encode(self, model: ImagePromptModel, inputs: Inputs) -> None:
        """Find out what all pictures are asked for, once; then the encoders are no longer needed."""
        self.conditions = model.conditions(inputs.image, self.pairs)
        model.start_denoising()

    def batches(self) -> Iterator[Batch]:
        """All batches; picture n of the run depends on its own seed only, not on the batch it is in."""
        n = 0
        for (prompt, negative), sides in zip(self.pairs, self.conditions):
            for _ in range(self.args.n_iter):
                indices = range(n, n + self.args.n_samples)
                n += self.args.n_samples
                seeds = [self.args.seed + i for i in indices]
                noise = [self.latents[i] if self.latents is not None
                         else np.random.default_rng(seed).standard_normal(self.shape, np.float32)
                         for i, seed in zip(indices, seeds)]
                yield Batch(prompt, negative, sides, seeds, Tensor(np.stack(noise)))

    def make(self, model: ImagePromptModel, inputs: Inputs, sample: Callable,
             finish: Callable = lambda pictures: pictures) -> None:
        """Make and write all pictures of the run, then report; what does not change in a run is computed once.

        Args:
            model: patched, with a ControlNet for each hint; its UNet is gone after this.
            inputs: what it is given.
            sample: (denoise, batch) -> iterator over the latents after each step: what the task is made of.
            finish: the last touch to a batch of (B, H, W, 3) uint8 pictures.
        """
        model.set_ip_scale(self.args.ip_scale)
        controls = model.controls(inputs.hints, self.timesteps)
        self._save_hints(inputs.hints)
        last = len(self.pairs) * self.args.n_iter - 1
        if self.compiled:
            model.diffusion.compile()
        if self.compiled or self.args.ms_mode == 0 or default_mode() == 0:
            kept = self.graphs is not None and self.graphs.kept
            log.info("the first step %s", "takes compiled graphs of an earlier run" if kept else
                     "compiles graphs, once for this size and model: up to minutes")
        for n, batch in enumerate(self.batches()):
            cond, uncond = (side.repeated(len(batch.seeds)) for side in batch.sides)
            left_out = shortcuts(self.args, self.timesteps)
            denoise = model.diffusion.denoiser(cond, uncond, self.args.scale, controls, left_out)
            latents = self.sample(sample(denoise, batch), len(self.timesteps))
            if n == last:  # what it needed in memory is for the autoencoder now
                model.release_denoiser()
            self.save(finish(model.diffusion.decode(latents)), batch, inputs.shown())
        if self.graphs:
            self.graphs.keep()
        self.report()

    def _compiles(self, graphs: RunGraphs | None) -> bool:
        """Whether denoiser and decoder as graphs save time, and no flag says what to do."""
        if self.args.ms_mode is not None or default_mode() == 0:
            return False
        if graphs and (graphs.kept or self.args.graph_cache is not None):
            return True
        sides = 2 if self.args.scale > 1 else 1
        return self.total * sides * math.prod(self.shape[1:]) * len(self.timesteps) >= COMPILED_POSITIONS

    def sample(self, steps: Iterable[Tensor], total: int) -> Tensor:
        """Go through a sampler's steps under a progress bar; returns the last one, finished."""
        begun, x = time.time(), None
        for x in tqdm(steps, total=total, desc="sampling", unit="step", disable=None):
            pass
        x.asnumpy()  # Ascend runs behind the host; the clock stops when the last step is really done
        self.steps += total
        self.sampling_seconds += time.time() - begun
        return x

    def save(self, pictures: np.ndarray, batch: Batch, inputs: list) -> None:
        """Write a batch: single pictures under samples/, and a grid with the inputs on the left."""
        folder = Path(self.args.output_path)
        for picture, seed in zip(pictures, batch.seeds):
            if not self.args.skip_save:
                path = save_png(folder / "samples", Image.fromarray(picture), self.settings(batch, seed))
                log.debug("%s", path)
        if not self.args.skip_grid:
            self.last_grid = save_png(folder, grid(inputs, pictures), self.settings(batch, batch.seeds[0]),
                                      "grid-{:05d}.png")
        self.made += len(pictures)

    def _save_hints(self, hints: list[Hint]) -> None:
        """Write the hints that were made here, as canny-00000.png beside the grids."""
        settings = {"canny": as_typed(self.args.canny), "control_image": as_typed(self.args.control_image)}
        for hint in hints:
            if hint.made and not self.args.skip_save:
                save_png(Path(self.args.output_path), hint.picture, settings, "canny-{:05d}.png")

    def settings(self, batch: Batch, seed: int) -> dict:
        """What repeats an image, as text metadata."""
        return self.metadata.of(batch.prompt, batch.negative_prompt, seed)

    def report(self) -> None:
        """One line: where the pictures are, and how long they took."""
        seconds = time.time() - self.started
        rate = self.steps / self.sampling_seconds if self.sampling_seconds else 0.0
        nothing = self.args.skip_save and self.args.skip_grid
        where = "nowhere (--skip_save --skip_grid)" if nothing else self.args.output_path
        what = "1 image" if self.made == 1 else f"{self.made} images"
        log.info("%s in %s: %.1f s, %.2f step/s, %.3f img/s%s", what, where, seconds, rate, self.made / seconds,
                 f"; all together in {self.last_grid}" if self.last_grid else "")


def open_run(args: argparse.Namespace, config: InferenceConfig, inputs: Inputs, timesteps: np.ndarray) -> tuple:
    """Plan the run, build its model and encode what it is asked for: (Run, ImagePromptModel).

    Raises:
        UserError: flags or files do not fit together; nothing large is read before the flags are found good.
    """
    extra = extra_parts(args)
    weights = default_weights(args, config, args.family, controlled=None in extra.controlnets)
    run = Run(args, config.name, weights, timesteps)
    log.info("loading %s", weights)
    model = build_model(weights, config.model, args.dtype, extra, staged=True, family=args.family)
    if args.family is SDXL:
        model.diffusion.sizes = picture_sizes(args)
    run.plan_graphs(model)
    run.encode(model, inputs)
    return run, model


def shortcuts(args: argparse.Namespace, timesteps: np.ndarray) -> Shortcuts:
    """What the flags leave out, at which of the sampler's timesteps."""
    end = 1.0 if args.guidance_end is None else args.guidance_end
    guided = timesteps_between(timesteps, args.guidance_start or 0.0, end)
    return Shortcuts(frozenset(float(t) for t in timesteps if float(t) not in guided),
                     frozenset(float(t) for i, t in enumerate(timesteps) if i % (args.deep_every or 1)))


def picture_sizes(args: argparse.Namespace) -> Sizes:
    """The sizes SDXL is told; those no flag gives are the output's."""
    return Sizes((args.orig_height or args.H, args.orig_width or args.W), (args.crop_coords_top, args.crop_coords_left),
                 (args.target_height or args.H, args.target_width or args.W))


def prompt_pairs(args: argparse.Namespace) -> tuple:
    """Prompts and negative prompts of a run, equally many."""
    prompts = read_lines(args.data_path, "--data_path") if args.data_path else [args.prompt]
    negatives = [args.negative_prompt]
    if args.negative_data_path:
        negatives = read_lines(args.negative_data_path, "--negative_data_path", blank=True)
    if len(negatives) == 1:
        negatives = negatives * len(prompts)
    if len(negatives) != len(prompts):
        raise UserError(f"--negative_data_path {args.negative_data_path}: has {len(negatives)} lines, expected 1 or "
                        f"{len(prompts)}, one for each prompt")
    return prompts, negatives


def read_lines(path: Path, flag: str, blank: bool = False) -> list:
    """The lines of a UTF-8 text file; those that are blank only with `blank`, as empty texts."""
    try:
        text = path.read_text(encoding="utf-8-sig").replace("\0", "")
    except UnicodeDecodeError:
        raise UserError(f"{flag} {path}: is not UTF-8 text; expected one prompt a line") from None
    # Not splitlines: U+2028 and its like may stand within a prompt.
    lines = [line.strip() for line in text.removesuffix("\n").split("\n")]
    if not any(lines):
        raise UserError(f"{flag} {path}: holds no prompt; expected one a line")
    return [line for line in lines if line or blank]


def read_latents(path: Path, shape: tuple) -> np.ndarray:
    """Starting noise (n, *shape) float32 from a .npy file."""
    try:
        latents = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"--latents {path}: is not a .npy file of numbers ({error})") from None
    is_array = isinstance(latents, np.ndarray)
    if not is_array or latents.dtype.kind != "f" or latents.ndim != 4 or latents.shape[1:] != shape:
        found = f"{latents.dtype} {latents.shape}" if is_array else "an archive"
        raise UserError(f"--latents {path}: holds {found}, expected float32 (n, {', '.join(map(str, shape))}); "
                        "see --H and --W")
    greatest = np.abs(latents).max(initial=0)
    if not greatest <= MAX_LATENT:  # also where it is NaN
        raise UserError(f"--latents {path}: holds values up to {greatest:.3g}; expected noise of unit variance, "
                        "without NaN or infinite values")
    return latents.astype(np.float32)
