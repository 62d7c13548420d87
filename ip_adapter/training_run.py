"""One training run: where it stands, what it writes, and how it goes on after a stop."""
from __future__ import annotations

import argparse
import contextlib
import csv
import logging
import math
import re
import time
from pathlib import Path
from typing import Callable, Iterable, Iterator

import mindspore as ms
import numpy as np
from mindspore import Tensor
from tqdm import tqdm

from ip_adapter.charts import loss_chart
from ip_adapter.script import collected_signals
from ip_adapter.training import AdamW, OptimizerConfig, TrainStep, learning_rate
from ip_adapter.training_cli import STATE
from ldm.checkpoint_file import CheckpointError, open_checkpoint, save_arrays
from ldm.errors import UserError
from ldm.parallel import Group, average

log = logging.getLogger(__name__)

LOG_COLUMNS = ("step", "loss", "learning_rate", "loss_scale", "overflow", "images_per_second")


def optimizer_config(args: argparse.Namespace) -> OptimizerConfig:
    """The settings of the optimizer among the flags; the loss is scaled in float16 only."""
    scaled = args.dtype == "float16"
    return OptimizerConfig(
        args.beta1, args.beta2, weight_decay=args.weight_decay, max_grad_norm=args.max_grad_norm,
        ema_decay=args.ema_decay, loss_scale=args.init_loss_scale if scaled else 1.0,
        loss_scale_factor=args.loss_scale_factor, scale_window=args.scale_window if scaled else 0)


class TrainingRun:
    """Counts steps, logs, saves and resumes.

    In the output folder: what is published after each so many steps, beside it `train_resume.ckpt` with all the next
    step depends on, `log.csv` and `loss.png`.

    Args:
        args: parsed flags of `ip_adapter.training_cli.training_parser`.
        optimizer: knows what trains.
        length: samples of the data set.
        publish: (path without suffix, trained arrays) -> writes what users load; returns the paths.
        name: of published files without suffix, within the output folder, {} being the step.
        group: the processes that train together; rank 0 alone writes.
        validate: called with the step every `--validation_interval` steps, on rank 0.

    Raises:
        UserError: the folder holds a run and `--resume` is not given, or the state to resume is not of this run.
    """

    def __init__(self, args: argparse.Namespace, optimizer: AdamW, length: int, publish: Callable, name: str,
                 group: Group = Group(), validate: Callable | None = None):
        self.args, self.optimizer, self.publish, self.group, self.validate = args, optimizer, publish, group, validate
        self.folder = Path(args.output_path)
        self.ckpt, self.name = (self.folder / name).parent, Path(name).name
        batch = args.train_batch_size * group.size * args.gradient_accumulation_steps
        self.batch = batch
        self.steps_per_epoch = math.ceil(length / batch)
        self.total = min(limit for limit in (math.ceil(args.epochs * length / batch), args.max_steps) if limit)
        # What decides which samples and which random numbers a step sees.
        self.identity = {"seed": args.seed, "train_batch_size": args.train_batch_size * group.size,
                         "gradient_accumulation_steps": args.gradient_accumulation_steps, "rows": length,
                         "image_size": args.image_size, "buckets": int(args.buckets)}
        self.step, self.history, self.published = 0, [], []
        state = self.ckpt / STATE
        if args.resume:
            self._resume(state if args.resume is True else Path(args.resume))
        elif state.exists() or self._would_overwrite():
            raise UserError(f"--output_path {self.folder}: holds a training already; go on with it by --resume True, "
                            "or choose another folder")

    def _would_overwrite(self) -> bool:
        """Whether there are files of another run under names this one will use."""
        found = [re.fullmatch(re.escape(self.name).replace(r"\{\}", r"(\d+)"), path.stem)
                 for path in self.ckpt.glob(self.name.format("*") + ".*")]
        steps = [int(match[1]) for match in found if match]
        return any(step == self.total or step < self.total and self._save_due(step) for step in steps)

    def _resume(self, path: Path) -> None:
        """Take up a state; what the log has beyond it is dropped, for it will be run again."""
        if not path.is_file():
            raise UserError(f"--resume {path}: no such file; expected {STATE} of an earlier run")
        with open_checkpoint(path) as file:
            arrays = {name: file.read(name) for name in file.tensors}
        try:
            found = {key: int(arrays[f"run.{key}"]) for key in self.identity}
            step, published = int(arrays["run.step"]), arrays["run.published"].tolist()
        except KeyError as error:
            raise CheckpointError(f"--resume {path}: holds no {error}, expected {STATE} of an earlier run") from None
        differing = [f"--{key} {value} (now {self.identity[key]})" for key, value in found.items()
                     if value != self.identity[key]]
        if differing:
            raise UserError(f"--resume {path}: was trained with {', '.join(differing)}; give the same, or start anew "
                            "in another folder")
        try:
            self.optimizer.load_state(arrays)
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"--resume {path}: does not fit what is trained now: {error}; was it another model, "
                                  "or --ema_decay changed?") from None
        # Files in a folder the state does not come from are not this run's, whatever their names.
        self.step, self.published = step, published if path.resolve().parent == self.ckpt.resolve() else []
        with contextlib.suppress(FileNotFoundError):
            with open(self.folder / "log.csv", newline="", encoding="utf-8") as file:
                self.history = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
        log.info("going on after step %d of %d", self.step, self.total)

    def train(self, step: TrainStep, batches: Iterable, inputs: Callable) -> None:
        """Run to the end, or to the first Ctrl-C, after which the state is saved and the step's end awaited.

        Args:
            step: learns from a batch.
            batches: from batch number `step * gradient_accumulation_steps` on.
            inputs: batch -> what the loss takes.

        Raises:
            KeyboardInterrupt: it was interrupted; nothing is lost.
        """
        accumulation = self.args.gradient_accumulation_steps
        with collected_signals() as received, self._log_file() as write, tqdm(
                total=self.total, initial=self.step, desc="training", unit="step",
                disable=True if self.group.rank else None) as bar:
            if self.published and self.group.rank == 0:
                self._publish()  # the run that is resumed may have been killed before it had
            losses, begun = [], time.time()
            for batch in batches if self.step < self.total else ():
                part = batch.step % accumulation
                rate = self._learning_rate()
                loss, made = step(Tensor(rate, ms.float32), Tensor(part == 0), part == accumulation - 1, *inputs(batch))
                losses.append(float(loss.asnumpy()))
                if part < accumulation - 1:
                    continue
                self.step += 1
                # A signal reaches processes at different steps: they stop at the first that all have heard of.
                loss, stop = average(np.array([np.mean(losses), bool(received)], np.float32))
                images = self.batch / (time.time() - begun)
                write(dict(zip(LOG_COLUMNS, (
                    self.step, f"{loss:.6g}", f"{rate:.6g}", float(self.optimizer.loss_scale.asnumpy()),
                    int(not made.asnumpy()), f"{images:.4g}"))))
                bar.set_postfix(loss=f"{loss:.4f}", lr=f"{rate:.2g}", **{"img/s": f"{images:.2f}"})
                bar.update()
                stop = bool(stop) and self.step < self.total
                if self.group.rank == 0:
                    self._write(stop)
                losses, begun = [], time.time()
                if stop:
                    average(np.zeros(1, np.float32))  # rank 0 has saved before anybody leaves
                    raise KeyboardInterrupt(*received)
                if self.step == self.total:
                    break
        log.info("%d steps in %s", self.step, self.folder)

    def _write(self, stop: bool) -> None:
        """The files that are due after a step."""
        if stop or self.step == self.total or self._save_due(self.step):
            self.save()
        if self.validate and self.args.validation_interval and self.step % self.args.validation_interval == 0:
            self.validate(self.step)

    def _learning_rate(self) -> float:
        a = self.args
        return learning_rate(self.step, a.start_learning_rate, a.warmup_steps, self.total,
                             a.end_learning_rate if a.scheduler == "cosine" else None)

    def _save_due(self, step: int) -> bool:
        return step % (self.args.ckpt_save_interval * (1 if self.args.step_mode else self.steps_per_epoch)) == 0

    def save(self) -> None:
        """Write the state, then what users load; a save killed in between is finished by whoever resumes."""
        self.published = [step for step in self.published if step != self.step] + [self.step]
        numbers = {**self.identity, "step": self.step, "published": self.published}
        run = {f"run.{key}": np.array(value, np.int64) for key, value in numbers.items()}
        save_arrays(self.ckpt / STATE, {**self.optimizer.state(), **run})
        loss_chart([float(row["loss"]) for row in self.history], f"loss, {self.step} steps").save(
            self.folder / "loss.png")
        self._publish()

    def _publish(self) -> None:
        """Write what users load, of the step the state holds. Older files go by --ckpt_max_keep."""
        paths = self.publish(self.ckpt / self.name.format(self.step), self.optimizer.trained())
        kept = self.published[-self.args.ckpt_max_keep :] if self.args.ckpt_max_keep else self.published
        old, self.published = self.published[: -len(kept)], kept
        for step in old:
            for path in paths:
                (self.ckpt / f"{self.name.format(step)}{path.suffix}").unlink(missing_ok=True)

    @contextlib.contextmanager
    def _log_file(self) -> Iterator[Callable]:
        """A function that adds a row to log.csv; the file is on disk after every row. Rank 0 alone writes."""
        if self.group.rank:
            yield lambda row: None
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        fresh = self.folder / "log.csv.new"
        with open(fresh, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, LOG_COLUMNS)
            writer.writeheader()
            writer.writerows(self.history)
            file.flush()
            fresh.replace(self.folder / "log.csv")  # killed at any moment, a run leaves the rows of all before it

            def write(row: dict) -> None:
                self.history.append(row)
                writer.writerow(row)
                file.flush()

            yield write
