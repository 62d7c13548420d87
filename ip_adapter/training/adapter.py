"""Training of an adapter, from scratch or further, on images with captions: what both training scripts do."""
from __future__ import annotations

import argparse
import logging
import shlex
from functools import partial
from pathlib import Path

import numpy as np

from ip_adapter.cli.parser import first_existing
from ip_adapter.config import TrainingConfig
from ip_adapter.data.buckets import BucketStream, find_buckets, one_bucket
from ip_adapter.data.dataset import ImageTextDataset
from ip_adapter.data.feature_cache import FeatureBatch, FeatureCache
from ip_adapter.data.features import FrozenEncoders
from ip_adapter.data.stream import Batch, Loader, samples_of, stack
from ip_adapter.families import Family
from ip_adapter.training.loop import TrainingRun, optimizer_config
from ip_adapter.training.step import AdamW, NoisePredictionLoss, TrainStep, recompute_blocks
from ip_adapter.training.validation import Validation
from ip_adapter.weights.adapter_file import adapter_parameters, save_adapter
from ip_adapter.weights.loading import build_model
from ldm.parallel import Group

log = logging.getLogger(__name__)


def advice(family: Family, version: str, weights: Path, adapter: Path) -> str:
    """What to do with an adapter that was trained on `weights` and saved."""
    script = {"SD-1.5": "image_variation_sd.py", "SDXL": "image_variation_sdxl.py"}[family.name]
    return "make images with it: " + shlex.join(
        ["python", script, "--version", version, "--ckpt_path", str(weights), "--ip_adapter", str(adapter), "--img",
         "IMAGE"])


def train_adapter(args: argparse.Namespace, config: TrainingConfig, family: Family, dataset: ImageTextDataset,
                  group: Group) -> None:
    """Train what `adapter_parameters` names; see `ip_adapter.cli.training.training_parser` for `args`."""
    buckets = one_bucket(len(dataset), args.image_size)
    if args.buckets:
        buckets = find_buckets(dataset, args.image_size, args.train_batch_size * group.size, args.num_workers)
        dataset.size_of_row = buckets.size_of
    stream = BucketStream(buckets, args.train_batch_size, args.seed, group.size, group.rank)
    weights = first_existing([args.pretrained_model_path], "--pretrained_model_path", f"make it with {family.tool}")
    log.info("loading the model %s", weights)
    model = build_model(Path(weights), config.model, args.dtype, train_adapter=True, family=family)
    optimizer = AdamW(adapter_parameters(model), optimizer_config(args))
    if args.validation_interval:
        log.info("encoding the images and captions of the validation")
    validation = Validation(args, model) if args.validation_interval and group.rank == 0 else None
    run = TrainingRun(args, optimizer, len(dataset), lambda path, trained: save_adapter(path, trained, model),
                      family.finetuned, group, validation, partial(advice, family, args.version, weights))
    if args.recompute:
        recompute_blocks(model.diffusion.unet)
    loss = NoisePredictionLoss(model.diffusion.unet, model.embedder.image_proj)
    step = TrainStep(loss, optimizer, args.gradient_accumulation_steps, group.size)
    encoders = FrozenEncoders(model)
    first, make, collate = run.step * args.gradient_accumulation_steps, samples_of(dataset, args.seed), stack
    if args.cache_dir:
        log.info("encoding %d images, but for those that --cache_dir %s holds already", len(dataset),
                 args.cache_dir)
        caches = [FeatureCache(Path(args.cache_dir), encoders, size) for size in buckets.sizes]
        for cache, rows in zip(caches, buckets.members):
            cache.fill(dataset, args.train_batch_size, rows)
        encoders.release(keep_vae=validation is not None)
        collate = caches[0].collate

        def make(row: int, position: int) -> np.ndarray:
            return caches[buckets.of_row[row]].sample(row, position)

    def inputs(batch: Batch | FeatureBatch) -> tuple:
        features = batch.features if args.cache_dir else encoders.features(batch)
        drops = args.drop_image_prob, args.drop_text_prob, args.drop_both_prob
        return encoders.inputs(features, batch.positions, args.seed, drops, args.p2_k)

    with Loader(stream, make, first, args.num_workers, collate=collate) as loader:
        run.train(step, loader, inputs)
