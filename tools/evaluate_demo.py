"""What the demo model makes of scenes it never saw, judged by pixels: colours, shapes and places.

python tools/evaluate_demo.py --out runs/demo_evaluation
python tools/evaluate_demo.py --out runs/demo_curve --task text --ckpt_path runs/demo_unet/ckpt/unet-*.ckpt
"""
from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, this folder is not a package

from ip_adapter.cli.script import run_script, watch_signals  # noqa: E402

watch_signals(__name__)

from ip_adapter.cli.inference import DEMOS  # noqa: E402
from ip_adapter.cli.parser import (  # noqa: E402
    Parser,
    add_config_flags,
    add_device_flags,
    config_from,
    existing_file,
    first_existing,
    in_range,
    number_of,
    start_logging,
)
from ip_adapter.config import InferenceConfig, SamplingConfig  # noqa: E402
from ip_adapter.demo.tasks import TASKS  # noqa: E402
from ldm.errors import UserError  # noqa: E402
from ldm.files import write_text  # noqa: E402


def main(argv: list | None = None) -> None:
    """Parse the flags, judge the checkpoint or, over the steps of a training, each of several."""
    version, config = config_from(argv, DEMOS)
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for figures.json and a sheet of pictures for each task")
    add("--ckpt_path", type=existing_file, nargs="+", help="checkpoint (default: the demo model), or several of one "
        "training, NAME-STEP.ckpt, for curves.png")
    add("--ip_adapter", type=existing_file, nargs="+", help="adapter in place of the checkpoint's, or several")
    add("--controlnet", type=existing_file, help="ControlNet in place of the checkpoint's")
    add("--task", choices=TASKS, action="append", help="which to judge, may be repeated (default: all)")
    add("--count", type=in_range(int, 2, 100000), default=200, help="scenes")
    add("--variations", type=in_range(int, 1, 100), default=4, help="pictures of each")
    add("--steps", type=number_of(SamplingConfig, "sampling_steps"), default=20, help="denoising steps")
    add("--scale", type=number_of(SamplingConfig, "scale"), default=config.sampling.scale,
        help="classifier-free guidance")
    add("--seed", type=number_of(SamplingConfig, "seed"), default=1_000_000, help="of scenes; those trained on have 0")
    add_config_flags(parser, version, DEMOS)
    add_device_flags(parser, "0")
    args = parser.parse_args(argv)
    start_logging(args.log_level)
    several = [flag for flag in ("ckpt_path", "ip_adapter") if len(getattr(args, flag) or ()) > 1]
    if len(several) == 2:
        raise UserError("--ckpt_path and --ip_adapter name several files both; the curve is of one of them")
    steps = sorted((step_of(path, flag), path) for flag in several for path in getattr(args, flag))
    from ip_adapter.demo.evaluation import figure_curves  # MindSpore is imported once the flags are found good
    from ip_adapter.evaluation.results import own_folder, save_image, writing
    from ldm.device import start_device
    with own_folder(args.out, "--out"):
        start_device(args.device_target, 0 if args.ms_mode is None else args.ms_mode, args.cpu_threads)
        if not several:
            judged(args, config, args.out)
            return
        figures = {step: judged(argparse.Namespace(**{**vars(args), several[0]: [path]}), config, args.out / str(step))
                   for step, path in steps}
        with writing(args.out, "--out"):
            save_image(args.out / "curves.png", figure_curves(figures))


def judged(args: argparse.Namespace, config: InferenceConfig, folder: Path) -> dict:
    """Make the pictures of every task, write sheets and figures into the folder, print the table: task -> figures."""
    from PIL import Image
    from tqdm import tqdm

    from ip_adapter.demo.evaluation import DemoJudge
    from ip_adapter.evaluation.results import save_image, writing
    from ip_adapter.weights.loading import ExtraParts, build_model
    from ldm.device import default_dtype
    tasks = args.task or list(TASKS)
    controlled = any(TASKS[task].controlled for task in tasks)
    weights, adapter = ((getattr(args, flag) or [None])[0] for flag in ("ckpt_path", "ip_adapter"))
    weights = weights or first_existing(config.ckpt_path, "--ckpt_path")
    model = build_model(weights, config.model, args.dtype or default_dtype(),
                        ExtraParts(adapter, None, [args.controlnet] if controlled else []), family=None)
    judge = DemoJudge(model, config.sampling.H, args.steps, args.scale, args.seed, args.count, args.variations)
    settings = {"checkpoint": weights.name, "scenes": args.count, "variations": args.variations, "steps": args.steps,
                "guidance_scale": args.scale, "seed": args.seed}
    figures = {}
    for task in tasks:
        batches = tqdm(judge.batches(TASKS[task]), total=args.count, desc=task, unit="scene", disable=None)
        figures[task], sheet = judge.judge(TASKS[task], batches)
        logging.info("%-12s %s", task, "  ".join(f"{name} {100 * value:.1f}" if name != "iou" else f"IoU {value:.3f}"
                                                for name, value in figures[task].items()))
        # After every task, for one may take an hour: what is known outlives a run that is stopped.
        with writing(folder, "--out"):
            save_image(folder / f"{task}.png", Image.fromarray(sheet))
            write_text(folder / "figures.json", json.dumps({**settings, **figures}, indent=1) + "\n")
    return figures


def step_of(path: Path, flag: str) -> int:
    """The step in the name of a checkpoint."""
    found = re.search(r"-(\d+)(_ip_only)?$", path.stem)
    if not found:
        raise UserError(f"--{flag} {path}: has no step in its name; several files are expected as NAME-STEP.ckpt")
    return int(found[1])


if __name__ == "__main__":
    run_script(main)
