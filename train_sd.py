"""Train an IP-Adapter for Stable Diffusion 1.5, from scratch or further, on pictures with captions.

python train_sd.py --data_path datasets/pokemon_blip/train \
    --pretrained_model_path checkpoints/sd_models/merged/sd_v1.5_ip_adapter.ckpt
"""
from __future__ import annotations

from pathlib import Path

from ip_adapter.adapter_file import adapter_parameters, save_adapter
from ip_adapter.build import build_model
from ip_adapter.cli import config_from, execute, first_existing
from ip_adapter.config import TrainingConfig
from ip_adapter.dataset import Batch, ImageTextDataset, Loader, Stream, draws, samples_of, stack
from ip_adapter.feature_cache import FeatureBatch, FeatureCache
from ip_adapter.features import FrozenEncoders, training_inputs
from ip_adapter.training import AdamW, NoisePredictionLoss, TrainStep
from ip_adapter.training_cli import TRAINING_SD, start_training, training_parser
from ip_adapter.training_run import TrainingRun, optimizer_config
from ip_adapter.validation import Validation


def main(argv: list | None = None) -> None:
    """Parse the flags, build the model, train, save."""
    version, config = config_from(argv, TrainingConfig, TRAINING_SD)
    args = training_parser(__doc__, version, config, TRAINING_SD).parse_args(argv)
    group = start_training(args)

    dataset = ImageTextDataset(args.data_path, args.image_size, args.random_crop, args.max_broken)
    stream = Stream(len(dataset), args.train_batch_size, args.seed, group.size, group.rank)
    weights = first_existing([args.pretrained_model_path], "--pretrained_model_path",
                             "make it with tools/merge_ckpts_sd.py")
    model = build_model(Path(weights), config.model, args.dtype, train_adapter=True)
    optimizer = AdamW(adapter_parameters(model), optimizer_config(args))
    validation = Validation(args, model) if args.validation_interval and group.rank == 0 else None
    run = TrainingRun(args, optimizer, len(dataset), lambda path, trained: save_adapter(path, trained, model),
                      group=group, validate=validation)
    loss = NoisePredictionLoss(model.diffusion.unet, model.embedder.image_proj,
                               model.diffusion.schedule.loss_weights(args.p2_k))
    step = TrainStep(loss, optimizer, args.gradient_accumulation_steps, group.size)
    encoders = FrozenEncoders(model)
    first, make, collate = run.step * args.gradient_accumulation_steps, samples_of(dataset, args.seed), stack
    if args.cache_dir:
        cache = FeatureCache(Path(args.cache_dir), encoders, args.image_size)
        cache.fill(dataset, args.train_batch_size)
        encoders.release(keep_vae=validation is not None)
        make, collate = cache.sample, cache.collate

    def inputs(batch: Batch | FeatureBatch) -> tuple:
        features = batch.features if args.cache_dir else encoders.features(
            batch.pixels, batch.clip_pixels, batch.texts)
        drawn = [draws(args.seed, int(position), features.mean.shape[1:], args.drop_image_prob, args.drop_text_prob,
                       args.drop_both_prob) for position in batch.positions]
        return training_inputs(features, drawn, encoders.empty_text, model.diffusion.schedule,
                               model.diffusion.scale_factor)

    with Loader(stream, make, first, args.num_workers, collate=collate) as loader:
        run.train(step, loader, inputs)


if __name__ == "__main__":
    execute(main)
