"""A training of one number, and the state that trainings leave."""
from __future__ import annotations

import argparse
import itertools
from types import SimpleNamespace

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from ip_adapter.training.loop import TrainingRun
from ip_adapter.training.step import AdamW, OptimizerConfig, TrainStep
from ldm.checkpoints.file import save_arrays
from tests.support.arrays import arrays


class Scaled(nn.Cell):
    """The mean of (a x)^2."""

    def __init__(self):
        super().__init__()
        self.a = Parameter(Tensor(np.array([0.5, -0.25], np.float32)), "a")

    def construct(self, x):
        return ops.square(self.a * x).mean()


def flags(folder, **changed) -> argparse.Namespace:
    values = dict(
        output_path=str(folder), train_batch_size=2, gradient_accumulation_steps=1, epochs=0, max_steps=4, seed=1,
        image_size=64, buckets=False, resume=False, ckpt_save_interval=2, step_mode=True, ckpt_max_keep=0, ms_mode=1,
        start_learning_rate=0.01, warmup_steps=0, scheduler="constant", end_learning_rate=0.0, validation_interval=0)
    return argparse.Namespace(**{**values, **changed})


def run_of(folder, config=OptimizerConfig(), length=10, **changed) -> TrainingRun:
    network = Scaled()
    optimizer = AdamW({"a": network.a}, config)

    def publish(path, trained):
        save_arrays(path.with_name(path.name + ".safetensors"), trained)
        return [path.with_name(path.name + ".safetensors")]

    run = TrainingRun(flags(folder, **changed), optimizer, length, publish, "ckpt/line-{}")
    run.network = network
    return run


def train(run: TrainingRun, values=(1.0, 2.0)) -> None:
    """Train on batches that are these numbers in turn."""
    first = run.step

    def batches():
        for step in itertools.count(first):
            yield SimpleNamespace(step=step, value=values[step % len(values)])

    step = TrainStep(run.network, run.optimizer)
    run.train(step, batches(), lambda batch: (Tensor(np.full((3, 2), batch.value, np.float32)),))


def parameters(folder) -> dict:
    return arrays(folder / "ckpt" / "train_resume.ckpt")
