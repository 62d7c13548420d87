"""One training run: where it stands, what it writes, and how it goes on after a stop."""
from __future__ import annotations

import argparse
import contextlib
import logging
import math
import signal
import time
from pathlib import Path
from typing import Callable, Iterable, Iterator

import mindspore as ms
import numpy as np
from mindspore import Tensor

from ip_adapter.cli.script import SIGNALS, collected_signals
from ip_adapter.config import STATE
from ip_adapter.images.charts import loss_chart
from ip_adapter.training.log import LOG_COLUMNS, LogFile, Progress, counted, read_log
from ip_adapter.training.plan import plan, state_to_resume
from ip_adapter.training.resume import read_state, write_state
from ip_adapter.training.step import AdamW, OptimizerConfig, TrainStep, learning_rate
from ldm.checkpoints.file import CheckpointError
from ldm.errors import UserError
from ldm.files import check_writable, locked, made_folder, replacing
from ldm.parallel import Group, average

log = logging.getLogger(__name__)


@contextlib.contextmanager
def own_folder(args: argparse.Namespace, group: Group) -> Iterator[None]:
    """Keep `--output_path` for this run alone, from before the model is loaded on; if nothing is written, no folder
    is left. The processes of a run share it: rank 0, which writes, holds it for all.

    Raises:
        UserError: another process trains there, or it cannot be written.
    """
    if group.rank:
        yield
        return
    check_writable(args.output_path, "--output_path", folder=True)
    with made_folder(args.output_path) as folder, locked(folder, "--output_path"):
        yield


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
        args: parsed flags of `ip_adapter.cli.training.training_parser`.
        optimizer: knows what trains.
        length: samples of the data set.
        publish: (path without suffix, trained arrays) -> writes what users load; returns the paths.
        name: of published files without suffix, within the output folder, {} being the step.
        group: the processes that train together; rank 0 alone writes.
        validate: called with the step every `--validation_interval` steps, on rank 0.
        advice: the path of the first file that is published -> a line on what to do with it.

    Raises:
        UserError: the folder holds a run and `--resume` is not given, or the state to resume is not of this run.
    """

    def __init__(self, args: argparse.Namespace, optimizer: AdamW, length: int, publish: Callable, name: str,
                 group: Group = Group(), validate: Callable | None = None, advice: Callable | None = None):
        self.args, self.optimizer, self.publish, self.group, self.validate = args, optimizer, publish, group, validate
        self.folder = Path(args.output_path)
        self.ckpt, self.name = (self.folder / name).parent, Path(name).name
        self.plan = plan(args, length, group.size)
        self.total = self.plan.total
        # What decides which samples and which random numbers a step sees.
        self.identity = {"seed": args.seed, "train_batch_size": args.train_batch_size * group.size,
                         "gradient_accumulation_steps": args.gradient_accumulation_steps, "rows": length,
                         "image_size": args.image_size, "buckets": int(args.buckets)}
        self.step, self.history, self.published = 0, [], []
        self.files, self.advice, self.validated = [], advice, False
        # Once more, for since the flags were checked another training may have begun and ended.
        state = state_to_resume(args, name, self.plan)
        if state:
            self._resume(state)

    def _resume(self, path: Path) -> None:
        """Take up a state; what the log has beyond it is dropped, for it will be run again."""
        arrays, step, published = read_state(path, self.identity)
        try:
            self.optimizer.load_state(arrays)
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"--resume {path}: does not fit what is trained now: {error}; was it another model, "
                                  "or --ema_decay changed? Give the same, or start anew in another folder") from None
        # Files in a folder the state does not come from are not this run's, whatever their names.
        self.step, self.published = step, published if path.resolve().parent == self.ckpt.resolve() else []
        self.history = read_log(self.folder / "log.csv", step) if self.group.rank == 0 else []
        log.info("going on after step %d of %d", self.step, self.total)

    def train(self, step: TrainStep, batches: Iterable, inputs: Callable) -> None:
        """Run to the end, or to a signal, after which the step under way is finished and the state saved.

        Until the first step of this process is made there is nothing to save: a signal stops it at once.

        Args:
            step: learns from a batch.
            batches: from batch number `step * gradient_accumulation_steps` on.
            inputs: batch -> what the loss takes.

        Raises:
            KeyboardInterrupt: it was interrupted, by the signal whose number it carries; nothing is lost.
            UserError: the loss is not finite, and no lower loss scale can help.
        """
        accumulation = self.args.gradient_accumulation_steps
        with contextlib.ExitStack() as stack:
            signals, table = [], stack.enter_context(contextlib.closing(LogFile(self.folder / "log.csv", self.history)))
            progress = stack.enter_context(contextlib.closing(Progress(self.step, self.total, self.group.rank == 0)))
            if self.published and self.group.rank == 0:
                self._publish()  # the run that is resumed may have been killed before it had
            if self.step < self.total and not self.args.ms_mode:
                progress.say("compiling the training step, as every start has to: minutes for a whole model, once")
            losses, begun, first = [], time.time(), self.step
            for batch in batches if self.step < self.total else ():
                part, rate = batch.step % accumulation, self._learning_rate()
                can_fall = self.optimizer.scale_can_fall()
                loss, made = step(Tensor(rate, ms.float32), Tensor(part == 0), part == accumulation - 1, *inputs(batch))
                losses.append(float(loss.asnumpy()))
                if part < accumulation - 1:
                    continue
                loss, number = self._agree(np.mean(losses), signals)
                if not (math.isfinite(loss) or can_fall):
                    raise self._not_finite(loss)
                if self.step == first:
                    signals = stack.enter_context(collected_signals())
                self.step += 1
                images = self.plan.batch / (time.time() - begun)
                self._after_step(table, progress, loss, rate, images, bool(made.asnumpy()), number)
                losses, begun = [], time.time()
                if self.step == self.total:
                    break
        self._say_done()

    def _agree(self, loss: float, signals: list) -> tuple:
        """The loss over all processes, and the number of a signal that one of them has received, or 0.

        A signal reaches processes at different steps: they stop at the first that all have heard of.
        """
        numbers = list(SIGNALS)
        loss, *heard = average(np.array([loss, *(number in signals for number in numbers)], np.float32))
        return float(loss), next((number for number, one in zip(numbers, heard) if one), 0)

    def _not_finite(self, loss: float) -> UserError:
        saved = self.ckpt / STATE
        left = f"{saved} stays as it was saved last" if saved.is_file() else "no state was saved yet"
        return UserError(f"the loss of step {self.step + 1} is {loss}, expected a finite number: the training has run "
                         f"away or a value overflows; {left}; try a lower --start_learning_rate, --max_grad_norm 1, or "
                         "--dtype float32 if it is float16")

    def _after_step(self, table: LogFile, progress: Progress, loss: float, rate: float, images: float, made: bool,
                    number: int) -> None:
        """Log a step and write the files that are due; stop if a signal was heard before the last one."""
        stop = number and self.step < self.total
        progress.report(self.step, loss, rate, images)
        if self.group.rank == 0:
            table.add(dict(zip(LOG_COLUMNS, (
                self.step, f"{loss:.6g}", f"{rate:.6g}", float(self.optimizer.loss_scale.asnumpy()), int(not made),
                f"{images:.4g}"))))
            if stop or self.step == self.total or self.plan.save_due(self.step):
                self.save()
            if self.validate and self.args.validation_interval and not stop and (
                    self.step % self.args.validation_interval == 0):
                self._validate(progress)
        progress.done()  # only now: a full bar means that nothing is left to do
        if stop:
            progress.say(f"the state of step {self.step} of {self.total} is saved; go on by --resume True, with "
                         f"--output_path {self.folder}")
            average(np.zeros(1, np.float32))  # rank 0 has saved before anybody leaves
            raise KeyboardInterrupt(signal.Signals(number))

    def _validate(self, progress: Progress) -> None:
        """Make the validation images with what users load: the averages, if there are any."""
        compiled = self.validated or self.args.ms_mode
        progress.say(f"making the validation images of step {self.step}" + (
            "" if compiled else "; the first time their network is compiled: minutes for a whole model"))
        with self.optimizer.publishing():
            self.validate(self.step)
        self.validated = True

    def _say_done(self) -> None:
        saved = f"; saved {' and '.join(map(str, self.files))}" if self.files else ""
        log.info("%s in %s%s", counted(self.step, "step"), self.folder, saved)
        if self.files and self.advice:
            log.info("%s", self.advice(self.files[0]))

    def _learning_rate(self) -> float:
        a = self.args
        return learning_rate(self.step, a.start_learning_rate, a.warmup_steps, self.total,
                             a.end_learning_rate if a.scheduler == "cosine" else None)

    def save(self) -> None:
        """Write the state, then what users load; a save killed in between is finished by whoever resumes."""
        self.published = [step for step in self.published if step != self.step] + [self.step]
        write_state(self.ckpt / STATE, self.optimizer.state(),
                    {**self.identity, "step": self.step, "published": self.published})
        with replacing(self.folder / "loss.png") as file:
            loss_chart([float(row["loss"]) for row in self.history], f"loss, {counted(self.step, 'step')}").save(
                file, "PNG")
        self._publish()

    def _publish(self) -> None:
        """Write what users load, of the step the state holds. Older files go by --ckpt_max_keep."""
        paths = self.files = self.publish(self.ckpt / self.name.format(self.step), self.optimizer.trained())
        kept = self.published[-self.args.ckpt_max_keep :] if self.args.ckpt_max_keep else self.published
        old, self.published = self.published[: -len(kept)], kept
        for step in old:
            for path in paths:
                (self.ckpt / f"{self.name.format(step)}{path.suffix}").unlink(missing_ok=True)
