"""How long a training is, when it saves, and whether its folder is free for it: known before MindSpore is imported."""
from __future__ import annotations

import argparse
import math
import re
from pathlib import Path
from typing import NamedTuple

from ip_adapter.config import STATE
from ip_adapter.training.resume import check_state
from ldm.errors import UserError
from ldm.files import printable


class Plan(NamedTuple):
    """The steps of a training."""

    batch: int  # samples of one step over all devices
    total: int  # the last step
    save_every: int  # steps

    def save_due(self, step: int) -> bool:
        """Whether files are written after this step; after the last one they always are."""
        return step % self.save_every == 0


def plan(args: argparse.Namespace, length: int, devices: int) -> Plan:
    """The steps that the flags ask for.

    Args:
        args: parsed flags of `ip_adapter.cli.training.training_parser`.
        length: samples of the data set.
        devices: that train together.
    """
    batch = args.train_batch_size * devices * args.gradient_accumulation_steps
    total = min(limit for limit in (math.ceil(args.epochs * length / batch), args.max_steps) if limit)
    return Plan(batch, total, args.ckpt_save_interval * (1 if args.step_mode else math.ceil(length / batch)))


def state_to_resume(args: argparse.Namespace, name: str, steps: Plan) -> Path | None:
    """The state that `--resume` names, None to start anew.

    Args:
        args: parsed flags.
        name: of published files without suffix, within the output folder, {} being the step.
        steps: of this training.

    Raises:
        UserError: the state is missing or, without `--resume`, the folder holds a training: a state, or files under
            names that this training will use.
    """
    folder, name = (Path(args.output_path) / name).parent, Path(name).name
    if args.resume:
        return check_state(folder / STATE if args.resume is True else Path(args.resume))
    pattern = re.escape(name).replace(r"\{\}", r"(\d+)")
    found = [re.fullmatch(pattern, path.stem) for path in folder.glob(name.format("*") + ".*")]
    saved = [int(match[1]) for match in found if match]
    if (folder / STATE).exists() or any(
            step == steps.total or step < steps.total and steps.save_due(step) for step in saved):
        raise UserError(f"--output_path {printable(args.output_path)}: holds a training already; go on with it by "
                        "--resume True, or choose another folder")
    return None
