"""Train one part of the demo model on drawings: autoencoder, text and image encoder, UNet, ControlNet.

python tools/train_demo.py --part vae --data_path datasets/drawn_world
"""
from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, this folder is not a package

from ip_adapter.cli.script import run_script, watch_signals  # noqa: E402

watch_signals(__name__)

from ip_adapter.cli.parser import config_from, existing_file, first_existing  # noqa: E402
from ip_adapter.cli.training import TRAINING_DEMO, start_training, training_parser  # noqa: E402
from ip_adapter.config import TrainingConfig  # noqa: E402
from ldm.parallel import Group  # noqa: E402

if TYPE_CHECKING:
    from ip_adapter.data.dataset import ImageTextDataset

# Training settings that only an adapter has a use for, and those of parts that learn from features.
OF_ADAPTERS = ("buckets", "random_crop", "recompute", "drop_image_prob", "drop_both_prob", "validation_interval",
               "validation_data", "validation_count", "validation_steps")
OF_FEATURES = ("cache_dir", "p2_k", "drop_text_prob")

log = logging.getLogger(__name__)


def main(argv: list | None = None) -> None:
    """Parse the flags, train the part, save the whole model."""
    part, config = config_from(argv, TRAINING_DEMO, TrainingConfig, "--part")
    parser = training_parser(__doc__, part, config, TRAINING_DEMO, "--part", unused_settings(part))
    parser.add_argument("--vae", type=existing_file, help="checkpoint with the autoencoder, if it is another one")
    parser.add_argument("--open_clip_vit", type=existing_file,
                        help="checkpoint whose image encoder seeded weights begin with")
    args = parser.parse_args(argv)
    if not args.cache_dir and "cache_dir" not in unused_settings(part):
        parser.error("--cache_dir is empty; name a folder, for this part learns from features that are kept")
    name = f"ckpt/{part}-{{}}"
    dataset, group = start_training(args, parser.given, name)
    from ip_adapter.training.loop import own_folder
    with own_folder(args, group):
        train_part(args, config, part, name, dataset, group)


def unused_settings(part: str) -> tuple:
    """The training settings that are of no effect on a part of the demo model."""
    return OF_ADAPTERS if part.startswith(("unet", "controlnet")) else OF_ADAPTERS + OF_FEATURES


def train_part(args: argparse.Namespace, config: TrainingConfig, part: str, name: str,
               dataset: ImageTextDataset, group: Group) -> None:
    """Train a part of the demo model; files are published as `name` in the output folder, {} being the step.

    MindSpore is imported here, once the flags are found good.
    """
    from ip_adapter.data.stream import Loader, Stream
    from ip_adapter.demo.stages import STAGES, demo_start
    from ip_adapter.training.loop import TrainingRun, optimizer_config
    from ip_adapter.training.step import AdamW, TrainStep
    from ip_adapter.weights.loading import ExtraParts, build_model
    family, stage_of = STAGES[part]
    # Encoders learn from what is alike within a batch, so their rows keep the order they were drawn in (--alike).
    stream = Stream(len(dataset), args.train_batch_size, args.seed, group.size, group.rank,
                    shuffle=not part.startswith("clip"))
    if args.pretrained_model_path:
        weights = first_existing([args.pretrained_model_path], "--pretrained_model_path")
    else:
        weights = Path(args.output_path) / "start.ckpt"
        demo_start(weights, args.seed, family, args.open_clip_vit)
    log.info("loading the model %s", weights)
    model = build_model(weights, config.model, args.dtype, ExtraParts(vae=args.vae), train_adapter=True,
                        family=family)
    stage = stage_of(model, dataset, args)
    optimizer = AdamW(stage.parameters, optimizer_config(args))
    run = TrainingRun(args, optimizer, len(dataset), stage.publish, name, group)
    step = TrainStep(stage.loss, optimizer, args.gradient_accumulation_steps, group.size)
    first = run.step * args.gradient_accumulation_steps
    with Loader(stream, stage.make, first, args.num_workers, collate=stage.collate) as loader:
        run.train(step, loader, stage.inputs)


if __name__ == "__main__":
    run_script(main)
