"""One training step: the loss, AdamW with loss scale, clipping and averages, compiled together into one graph."""
from __future__ import annotations

import math
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from ip_adapter.image_prompt import ImageProjModel
from ldm.modules.unet import UNetModel


class NoisePredictionLoss(nn.Cell):
    """Mean squared error of what a UNet predicts from text and image tokens, or from text alone.

    Args:
        unet: the network.
        image_proj: makes image tokens; None for text alone.

    Source:
        IP-Adapter (arXiv 2308.06721), eq. 6.
    """

    def __init__(self, unet: UNetModel, image_proj: ImageProjModel | None = None):
        super().__init__(auto_prefix=False)
        self.unet, self.image_proj = unet, image_proj

    def construct(self, x: Tensor, timesteps: Tensor, target: Tensor, text: Tensor, vector: Tensor = None,
                  embedding: Tensor = None) -> Tensor:
        """The loss of a batch.

        Args:
            x: (B, 4, H, W) float32 noisy latents.
            timesteps: (B,) float32.
            target: (B, 4, H, W) float32, what to predict: the noise that was added, or the velocity.
            text: (B, T, D) float32 text tokens.
            vector: (B, V) float32 vector condition of SDXL, or None.
            embedding: (B, E) float32 image embeddings, zero where the picture is dropped; None without a projector.

        Returns:
            () float32.
        """
        context = text
        if self.image_proj is not None:
            context = ops.concat((text, self.image_proj(embedding)), 1)
        return ops.square(self.unet(x, timesteps, context, vector) - target).mean()


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings of `AdamW`.

    Attributes:
        beta1: decay of the mean of the gradients.
        beta2: decay of the mean of their squares.
        epsilon: added to the root of the latter.
        weight_decay: decoupled from the gradient.
        max_grad_norm: gradients whose norm over all parameters is larger are scaled down to it; 0 for never.
        ema_decay: decay of the average of the parameters; 0 for no average.
        loss_scale: what the loss is multiplied by, so that small float16 gradients do not vanish; 1 for float32.
        loss_scale_factor: by which the scale falls after an overflow, and rises after `scale_window` good steps.
        scale_window: steps; 0 keeps the scale as it is.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.01
    max_grad_norm: float = 0.0
    ema_decay: float = 0.0
    loss_scale: float = 1.0
    loss_scale_factor: float = 2.0
    scale_window: int = 0


class AdamW(nn.Cell):
    """AdamW with bias correction; a step whose gradients overflow is skipped and the loss scale lowered.

    All parameters are updated as one vector: a network has hundreds of small ones, and to call a dozen operators for
    each takes longer than what they compute. Everything that is remembered is a parameter, so that a graph can change
    it and a file can hold it.

    Args:
        parameters: name -> parameter that trains, float32.
        config: settings.

    Source:
        arXiv 1711.05101, algorithm 2.
    """

    def __init__(self, parameters: dict, config: OptimizerConfig = OptimizerConfig()):
        super().__init__(auto_prefix=False)
        self.config, self.names = config, list(parameters)
        self.parameters = ParameterTuple(parameters.values())
        self.sizes = tuple(int(np.prod(parameter.shape)) for parameter in self.parameters)
        self.starts = tuple(int(n) for n in np.cumsum((0,) + self.sizes[:-1]))
        values = np.concatenate([parameter.asnumpy().reshape(-1) for parameter in self.parameters])
        self.vector = _remembered(values, "parameter")  # what the parameters hold
        self.mean, self.square = self.zeros("mean"), self.zeros("square")
        self.average = _remembered(values, "average") if config.ema_decay else None
        self.updates = _remembered(0.0, "updates")
        self.loss_scale = _remembered(config.loss_scale, "loss_scale")
        self.good_steps = _remembered(0.0, "good_steps")
        # A graph unrolls a loop into calls within calls; a map over a whole network stays flat.
        self.map, self.dot, self.adam = ops.HyperMap(), ops.MatMul(transpose_b=True), ops.Adam()

    def zeros(self, name: str) -> Parameter:
        """A vector of the parameters' size."""
        return _remembered(np.zeros(sum(self.sizes)), name)

    def flat(self, gradients: tuple) -> Tensor:
        """One gradient for each parameter -> the vector of all."""
        return ops.concat(self.map(_flat, gradients))

    def construct(self, gradient: Tensor, learning_rate: Tensor) -> Tensor:
        """Update all parameters.

        Args:
            gradient: what `flat` gives for the gradients of the loss times `loss_scale`.
            learning_rate: () float32.

        Returns:
            () bool, whether the gradients were finite and the step was made.
        """
        c, row = self.config, gradient.reshape((1, -1))
        total = self.dot(row, row).reshape(()) / ops.square(self.loss_scale)  # a sum takes ten times as long on the CPU
        finite = ops.isfinite(total)
        made = finite.astype(ms.float32)  # 0 for a step that is skipped: then nothing below changes anything
        factor = 1.0 / self.loss_scale
        if c.max_grad_norm > 0:
            factor = factor * ops.minimum(c.max_grad_norm / (ops.sqrt(total) + 1e-6), 1.0)
        updates, rate = self.updates + made, learning_rate * made
        # 1 - beta ** updates, without the cancellation it would suffer in float32
        correct1, correct2 = -ops.expm1(updates * math.log(c.beta1)), -ops.expm1(updates * math.log(c.beta2))
        beta1, beta2 = 1 - made * (1 - c.beta1), 1 - made * (1 - c.beta2)
        correct1, correct2 = ops.where(finite, correct1, 1.0), ops.where(finite, correct2, 1.0)
        gradient = ops.where(finite, gradient * factor, 0.0)
        vector = ops.depend(self.vector, ops.assign(self.vector, self.vector * (1 - rate * c.weight_decay)))
        # The operator divides by sqrt(square) + epsilon, the paper by sqrt(square / correct2) + epsilon.
        new = ops.depend(self.vector, self.adam(
            vector, self.mean, self.square, 1 - correct1, 1 - correct2, rate, beta1, beta2,
            c.epsilon * ops.sqrt(correct2), gradient))
        done = self.map(ops.partial(_put, new), self.starts, self.sizes, self.parameters)
        if c.ema_decay > 0:
            average = self.average + (new - self.average) * (made * (1 - c.ema_decay))
            done = ops.depend(done, ops.assign(self.average, average))
        finite = ops.depend(finite, done)  # a graph drops assignments that nothing it returns needs
        ops.assign(self.updates, updates)
        if c.scale_window > 0:
            self._rescale(finite)
        return finite

    def _rescale(self, finite: Tensor) -> None:
        c, good = self.config, self.good_steps + 1.0
        full = good >= c.scale_window
        risen = ops.where(full, self.loss_scale * c.loss_scale_factor, self.loss_scale)
        fallen = ops.maximum(self.loss_scale / c.loss_scale_factor, 1.0)
        ops.assign(self.loss_scale, ops.where(finite, risen, fallen))
        ops.assign(self.good_steps, ops.where(ops.logical_and(finite, ops.logical_not(full)), good, 0.0 * good))

    def _vectors(self) -> list:
        return [self.vector, self.mean, self.square] + [self.average] * bool(self.config.ema_decay)

    def _numbers(self) -> list:
        return [self.updates, self.loss_scale, self.good_steps]

    def _by_name(self, vector: Parameter) -> dict:
        values = vector.asnumpy()
        return {name: values[start : start + size].reshape(parameter.shape) for name, start, size, parameter
                in zip(self.names, self.starts, self.sizes, self.parameters)}

    def state(self) -> dict:
        """Name -> array: the parameters and all that the next step depends on."""
        return {**{f"{vector.name}.{name}": array for vector in self._vectors()
                   for name, array in self._by_name(vector).items()},
                **{number.name: number.asnumpy() for number in self._numbers()}}

    def load_state(self, arrays: dict) -> None:
        """The inverse of `state`.

        Raises:
            KeyError: an array is missing.
            ValueError: an array has another shape.
        """
        shapes = {name: array.shape for name, array in self.state().items()}
        for name, shape in shapes.items():
            if arrays[name].shape != shape:
                raise ValueError(f"`{name}` has shape {arrays[name].shape}, expected {shape}")
        for vector in self._vectors():
            vector.set_data(Tensor(np.concatenate([arrays[f"{vector.name}.{name}"].reshape(-1)
                                                   for name in self.names])))
        for number in self._numbers():
            number.set_data(Tensor(arrays[number.name]))
        for name, parameter in zip(self.names, self.parameters):
            parameter.set_data(Tensor(arrays[f"{self.vector.name}.{name}"]))

    def trained(self) -> dict:
        """Name -> array of what to use and publish: the averages if there are any, else the parameters."""
        return self._by_name(self.average if self.config.ema_decay else self.vector)


def _remembered(value: float | np.ndarray, name: str) -> Parameter:
    return Parameter(Tensor(value, ms.float32), name, requires_grad=False)


def _flat(gradient: Tensor) -> Tensor:
    return gradient.reshape((-1,))


def _put(vector: Tensor, start: int, size: int, parameter: Parameter) -> Tensor:
    """Set a parameter to its place in the vector."""
    return ops.assign(parameter, ops.Slice()(vector, (start,), (size,)).reshape(parameter.shape))


class _ScaledLoss(nn.Cell):
    """The loss, and the loss times the scale that is differentiated."""

    def __init__(self, loss: nn.Cell, loss_scale: Parameter):
        super().__init__(auto_prefix=False)
        self.loss, self.loss_scale = loss, loss_scale

    def construct(self, *batch: Tensor) -> tuple:
        loss = self.loss(*batch)
        return loss * self.loss_scale, loss


class TrainStep(nn.Cell):
    """Loss, gradients and update in one graph; with accumulation the update follows every n-th call.

    Args:
        loss: the network to differentiate; its construct takes a batch and gives a () float32.
        optimizer: updates what trains.
        accumulation: batches whose gradients are averaged before an update.
        processes: that train together; gradients are averaged over them.
    """

    def __init__(self, loss: nn.Cell, optimizer: AdamW, accumulation: int = 1, processes: int = 1):
        super().__init__(auto_prefix=False)
        self.optimizer, self.accumulation, self.processes = optimizer, accumulation, processes
        self.all_reduce = ops.AllReduce() if processes > 1 else None
        self.gradient = ms.value_and_grad(_ScaledLoss(loss, optimizer.loss_scale), None, optimizer.parameters,
                                          has_aux=True)
        self.sum = optimizer.zeros("sum") if accumulation > 1 else None

    def construct(self, learning_rate: Tensor, first: Tensor, update: bool, *batch: Tensor) -> tuple:
        """Learn from one batch.

        Args:
            learning_rate: () float32.
            first: () bool, whether this batch is the first after an update; of no effect without accumulation.
            update: whether this batch is the last before an update; always True without accumulation.
            batch: what the loss takes.

        Returns:
            The loss, () float32, and whether an update was made or only put off, () bool: False is an overflow.
        """
        (_, loss), gradients = self.gradient(*batch)
        gradient = self.optimizer.flat(gradients)
        if self.accumulation > 1:
            gradient = ops.assign(self.sum, ops.where(first, 0.0, self.sum) + gradient / self.accumulation)
            if not update:  # depend: a graph drops assignments that nothing it returns needs
                return ops.depend(loss, gradient), Tensor(True)
        if self.processes > 1:
            gradient = self.all_reduce(gradient) / self.processes
        return loss, self.optimizer(gradient, learning_rate)


def recompute_blocks(unet: UNetModel) -> None:
    """Let a graph keep only what goes into and out of the UNet's blocks, and compute the rest again for the gradients.

    Source:
        arXiv 1604.06174.
    """
    for block in (*unet.input_blocks, unet.middle_block, *unet.output_blocks):
        block.recompute()


def learning_rate(step: int, base: float, warmup_steps: int, total_steps: int, end: float | None = None) -> float:
    """The learning rate of a step: rises linearly during the warm-up, then stays, or falls along a cosine.

    Args:
        step: counted from 0.
        base: after the warm-up.
        warmup_steps: how long it rises.
        total_steps: of the whole training; only the cosine needs it.
        end: where the cosine ends; None to stay at `base`.
    """
    if step < warmup_steps:
        return base * (step + 1) / warmup_steps
    if end is None:
        return base
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return end + (base - end) * 0.5 * (1.0 + math.cos(math.pi * progress))
