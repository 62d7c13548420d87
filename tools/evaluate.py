"""CLIP-I and CLIP-T of an IP-Adapter, as in the paper: four pictures from each picture prompt, without text.

python tools/evaluate.py --images COCO2017/val2017 --weights checkpoints/sd_models/merged/sd_v1.5_ip_adapter.ckpt
"""
from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, this folder is not a package

from ip_adapter.cli.script import run_script, watch_signals  # noqa: E402

watch_signals(__name__)

from ip_adapter.cli.inference import EITHER, INFERENCE_SDXL  # noqa: E402
from ip_adapter.cli.parser import (  # noqa: E402
    Parser,
    add_config_flags,
    add_device_flags,
    checkpoint_file,
    config_from,
    existing_file,
    first_existing,
    in_range,
    multiple_of_8,
    number_of,
    one_of,
    start_logging,
)
from ip_adapter.config import InferenceConfig, SamplingConfig  # noqa: E402
from ip_adapter.families import SD15, SDXL  # noqa: E402


def main(argv: list | None = None) -> None:
    """Parse the flags, make and score the pictures, print the table."""
    version, config = config_from(argv, EITHER)
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--images", type=Path, required=True, help="folder with picture prompts and img_txt.csv (columns dir,text)")
    add("--weights", "--ckpt_path", dest="ckpt_path", type=checkpoint_file,
        help=f"merged checkpoint (default: {' or '.join(config.ckpt_path)})")
    add("--ip_adapter", type=existing_file, help="adapter to use instead of the checkpoint's")
    add("--clip", type=existing_file, help="whole CLIP in Hugging Face's layout to score with, such as openai's "
        "clip-vit-large-patch14 (default: the checkpoint's image encoder, which knows no texts)")
    add("--clip_activation", type=one_of("quick_gelu", "gelu"), default="quick_gelu",
        help="its activation: quick_gelu for OpenAI's, gelu for OpenCLIP's")
    add("--out", "--output_path", type=Path, default=Path("outputs/evaluation"),
        help="folder for pictures, results.csv, table.txt and sheet.png; a stopped run goes on in it")
    add("--count", type=in_range(int, 1, 10**9), default=5000, help="the first so many rows")
    add("--variations", type=in_range(int, 1, 100), default=4, help="pictures of each")
    add("--prompt", default="", help="text beside the picture")
    add("--negative_prompt", default="", help="text of the unconditional side")
    add("--ip_scale", type=number_of(SamplingConfig, "ip_scale"), default=1.0, help="weight of the picture prompt")
    add("--scale", "--guidance_scale", type=number_of(SamplingConfig, "scale"), default=7.5,
        help="classifier-free guidance")
    add("--sampling_steps", type=number_of(SamplingConfig, "sampling_steps"), default=50, help="denoising steps")
    add("--size", type=multiple_of_8, default=config.sampling.H, help="side of the pictures in pixels")
    add("--seed", type=number_of(SamplingConfig, "seed"), default=42, help="picture n is made from seed + n")
    add("--max_broken", type=in_range(int, 0, 10**9), default=100, help="so many unreadable pictures are skipped")
    add_config_flags(parser, version, EITHER)
    add_device_flags(parser, "0 on Ascend, 1 on the CPU")
    args = parser.parse_args(argv)
    if not args.clip and "clip_activation" in parser.given:
        parser.error("--clip_activation is that of the model --clip names; name one, or leave it out")
    start_logging(args.log_level)
    from ip_adapter.evaluation.results import own_folder
    with own_folder(args.out, "--out"):
        logging.info("%s", evaluate(args, config))


def evaluate(args: argparse.Namespace, config: InferenceConfig) -> str:
    """Make and score the images; returns the table. MindSpore is imported here, once the flags are found good."""
    from ip_adapter.data.dataset import ImageTextDataset
    from ip_adapter.evaluation.clip_evaluation import Evaluation
    from ip_adapter.evaluation.clip_score import open_scorer, own_scorer
    from ip_adapter.weights.loading import ExtraParts, build_model
    from ldm.device import default_dtype, start_device
    dataset = ImageTextDataset(args.images, args.size, max_broken=args.max_broken, flag="--images")
    weights = args.ckpt_path or default_checkpoint(args.version, config)
    evaluation = Evaluation(args, weights, dataset)
    start_device(args.device_target, args.ms_mode, args.cpu_threads)
    model = build_model(weights, config.model, args.dtype or default_dtype(), ExtraParts(args.ip_adapter),
                        family=None)
    scorer = open_scorer(args.clip, args.clip_activation) if args.clip else own_scorer(model)
    return evaluation.run(model, scorer)


def default_checkpoint(version: str, config: InferenceConfig) -> Path:
    """The configuration's checkpoint.

    Raises:
        UserError: it is not there.
    """
    family, demo = (SDXL, "xl_demo") if EITHER[version] in INFERENCE_SDXL.values() else (SD15, "demo")
    return first_existing(config.ckpt_path, "--weights", f"make it with {family.tool} or try --version {demo}")


if __name__ == "__main__":
    run_script(main)
