"""One training step: the loss, AdamW with loss scale, clipping and averages, compiled together into one graph."""
from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Iterator

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from ip_adapter.image_prompt import ImageProjModel
from ldm.modules.operators import inline, matmul_nt
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


# Parameters with fewer elements are updated together, as one vector.
PACKED = 1 << 16


class AdamW(nn.Cell):
    """AdamW with bias correction; a step whose gradients overflow is skipped and the loss scale lowered.

    Small parameters, of which a network has hundreds, are updated as one vector: to call a dozen operators for each
    takes longer than what they compute. Everything that is remembered is a parameter, so that a graph can change it and
    a file can hold it.

    Args:
        parameters: name -> parameter that trains, float32.
        config: settings.

    Attributes:
        parameters: those of `names`, the small ones first.

    Source:
        arXiv 1711.05101, algorithm 2.
    """

    def __init__(self, parameters: dict, config: OptimizerConfig = OptimizerConfig()):
        super().__init__(auto_prefix=False)
        self.config, self.logs = config, (_logarithm(config.beta1), _logarithm(config.beta2))
        self.names = sorted(parameters, key=lambda name: parameters[name].size >= PACKED)
        self.parameters = ParameterTuple([parameters[name] for name in self.names])
        self.small = ParameterTuple([parameter for parameter in self.parameters if parameter.size < PACKED])
        self.sizes = tuple(int(parameter.size) for parameter in self.small)
        self.starts = tuple(int(n) for n in np.cumsum((0,) + self.sizes[:-1]))
        packed = _packed([parameter.asnumpy() for parameter in self.parameters], len(self.small))
        # What is updated: the vector of the small parameters, if there are any, and each large one.
        vector = [_remembered(packed[0], "packed")] if self.small else []
        self.values = ParameterTuple(vector + list(self.parameters[len(self.small):]))
        self.mean, self.square = self.zeros("mean"), self.zeros("square")
        self.average = self.zeros("average") if config.ema_decay else ()
        for average, value in zip(self.average, packed):
            average.set_data(Tensor(value))
        self.updates = _remembered(0.0, "updates")
        self.loss_scale = _remembered(config.loss_scale, "loss_scale")
        self.good_steps = _remembered(0.0, "good_steps")
        # A graph unrolls a loop into calls within calls; a map over a whole network stays flat.
        self.map, self.add, self.adam = ops.HyperMap(), ops.AddN(), ops.Adam()

    def zeros(self, kind: str) -> ParameterTuple:
        """Zeros like what `gathered` gives."""
        return ParameterTuple([_remembered(np.zeros(value.shape), f"{kind}.{n}")
                               for n, value in enumerate(self.values)])

    def gathered(self, gradients: tuple) -> tuple:
        """One gradient for each parameter -> the vector of the small ones, if there are any, and each large one."""
        small = len(self.small)
        return (ops.concat(self.map(_flat, gradients[:small])),) + gradients[small:] if small else gradients

    def construct(self, gradients: tuple, learning_rate: Tensor) -> Tensor:
        """Update all parameters.

        Args:
            gradients: what `gathered` gives for those of the loss times `loss_scale`.
            learning_rate: () float32.

        Returns:
            () bool, whether the gradients were finite and the step was made.
        """
        c = self.config
        total = self.add(self.map(_squares, gradients)).reshape(()) / ops.square(self.loss_scale)
        finite = ops.isfinite(total)
        made = finite.astype(ms.float32)  # 0 for a step that is skipped: then nothing below changes anything
        factor = 1.0 / self.loss_scale
        if c.max_grad_norm > 0:
            factor = factor * ops.minimum(c.max_grad_norm / (ops.sqrt(total) + 1e-6), 1.0)
        updates, rate = self.updates + made, learning_rate * made
        # 1 - beta ** updates, without the cancellation it would suffer in float32
        correct1, correct2 = -ops.expm1(updates * self.logs[0]), -ops.expm1(updates * self.logs[1])
        beta1, beta2 = 1 - made * (1 - c.beta1), 1 - made * (1 - c.beta2)
        correct1, correct2 = ops.where(finite, correct1, 1.0), ops.where(finite, correct2, 1.0)
        # The operator divides by sqrt(square) + epsilon, the paper by sqrt(square / correct2) + epsilon.
        update = ops.partial(_adamw, self.adam, 1 - rate * c.weight_decay, finite, factor, 1 - correct1, 1 - correct2,
                             rate, beta1, beta2, c.epsilon * ops.sqrt(correct2))
        new = self.map(update, gradients, self.values, self.mean, self.square)
        done = new
        if self.small:
            done += self.map(ops.partial(_put, new[0]), self.starts, self.sizes, self.small)
        if c.ema_decay > 0:
            done += self.map(ops.partial(_average, made * (1 - c.ema_decay)), self.average, new)
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

    def _remembers(self) -> dict:
        """What is remembered of the parameters, by kind."""
        kinds = {"parameter": self.values, "mean": self.mean, "square": self.square}
        return {**kinds, "average": self.average} if self.config.ema_decay else kinds

    def _numbers(self) -> list:
        return [self.updates, self.loss_scale, self.good_steps]

    def _by_name(self, values: ParameterTuple) -> dict:
        arrays = [value.asnumpy() for value in values]
        small = [arrays[0][start : start + size] for start, size in zip(self.starts, self.sizes)]
        return {name: array.reshape(parameter.shape) for name, parameter, array
                in zip(self.names, self.parameters, small + arrays[bool(small):])}

    def state(self) -> dict:
        """Name -> array: the parameters and all that the next step depends on."""
        return {**{f"{kind}.{name}": array for kind, values in self._remembers().items()
                   for name, array in self._by_name(values).items()},
                **{number.name: number.asnumpy() for number in self._numbers()}}

    def load_state(self, arrays: dict) -> None:
        """The inverse of `state`.

        Raises:
            KeyError: an array is missing.
            ValueError: an array has another shape or type.
        """
        shapes = {f"{kind}.{name}": tuple(parameter.shape) for kind in self._remembers()
                  for name, parameter in zip(self.names, self.parameters)}
        for name, shape in {**shapes, **{number.name: () for number in self._numbers()}}.items():
            if arrays[name].shape != shape:
                raise ValueError(f"`{name}` has shape {arrays[name].shape}, expected {shape}")
            if arrays[name].dtype != np.float32:
                raise ValueError(f"`{name}` is {arrays[name].dtype.name}, expected float32")
        for kind, values in self._remembers().items():
            packed = _packed([arrays[f"{kind}.{name}"] for name in self.names], len(self.small))
            for value, array in zip(values, packed):
                value.set_data(Tensor(array))
        for number in self._numbers():
            number.set_data(Tensor(arrays[number.name]))
        for name, parameter in zip(self.names, self.small):
            parameter.set_data(Tensor(arrays[f"parameter.{name}"]))

    def trained(self) -> dict:
        """Name -> array of what to use and publish: the averages if there are any, else the parameters."""
        return self._by_name(self.average or self.values)

    @contextlib.contextmanager
    def publishing(self) -> Iterator[None]:
        """Within the block the network computes with what `trained` gives; afterwards with the parameters again."""
        if not self.average:
            yield
            return
        raw = [parameter.asnumpy().copy() for parameter in self.parameters]  # copies: an array may share the memory
        try:
            self._set(self.trained().values())
            yield
        finally:
            self._set(raw)

    def _set(self, arrays) -> None:
        for parameter, array in zip(self.parameters, arrays):
            parameter.set_data(Tensor(array.copy()))

    def scale_can_fall(self) -> bool:
        """Whether an overflow lowers the loss scale, so that the next step may do without."""
        c = self.config
        return c.scale_window > 0 and c.loss_scale_factor > 1 and float(self.loss_scale.asnumpy()) > 1


def _logarithm(beta: float) -> float:
    """The logarithm of a decay; for 0, of a number so small that its powers are 0 in float32."""
    return math.log(max(beta, 1e-300))


def _remembered(value: float | np.ndarray, name: str) -> Parameter:
    return Parameter(Tensor(value, ms.float32), name, requires_grad=False)


def _packed(arrays: list, small: int) -> list:
    """The first `small` arrays as one vector, if there are any, and the others."""
    vector = [np.concatenate([array.reshape(-1) for array in arrays[:small]])] if small else []
    return vector + arrays[small:]


def _squares(gradient: Tensor) -> Tensor:
    """The sum of squares, (1, 1): as a product, since the CPU's reductions take ten times as long."""
    flat = gradient.reshape((1, -1))
    return matmul_nt(flat, flat)


def _adamw(adam, decay: Tensor, finite: Tensor, factor: Tensor, power1: Tensor, power2: Tensor, rate: Tensor,
           beta1: Tensor, beta2: Tensor, epsilon: Tensor, gradient: Tensor, parameter: Parameter, mean: Parameter,
           square: Parameter) -> Tensor:
    """Shrink a parameter by its decay, then update it and its two moments; returns what it is now."""
    gradient = ops.where(finite, gradient * factor, 0.0)
    parameter = ops.depend(parameter, ops.assign(parameter, parameter * decay))
    return ops.depend(parameter, adam(parameter, mean, square, power1, power2, rate, beta1, beta2, epsilon, gradient))


def _average(weight: Tensor, average: Parameter, new: Tensor) -> Tensor:
    return ops.assign(average, average + (new - average) * weight)


def _added(first: Tensor, accumulation: int, total: Parameter, gradient: Tensor) -> Tensor:
    """Add one gradient to a sum, which starts anew with the first batch."""
    return ops.assign(total, ops.where(first, 0.0, total) + gradient / accumulation)


def _meaned(all_reduce, processes: int, gradient: Tensor) -> Tensor:
    return all_reduce(gradient) / processes


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
        self.all_reduce, self.map = ops.AllReduce() if processes > 1 else None, ops.HyperMap()
        self.gradient = ms.value_and_grad(_ScaledLoss(loss, optimizer.loss_scale), None, optimizer.parameters,
                                          has_aux=True)
        self.sums = optimizer.zeros("sum") if accumulation > 1 else ()

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
        gradients = self.optimizer.gathered(gradients)
        if self.accumulation > 1:
            gradients = self.map(ops.partial(_added, first, self.accumulation), self.sums, gradients)
            if not update:  # depend: a graph drops assignments that nothing it returns needs
                return ops.depend(loss, gradients), Tensor(True)
        if self.processes > 1:
            gradients = self.map(ops.partial(_meaned, self.all_reduce, self.processes), gradients)
        return loss, self.optimizer(gradients, learning_rate)


def recompute_blocks(unet: UNetModel) -> None:
    """Let a graph keep only what goes into and out of the UNet's blocks, and compute the rest again for the gradients.

    Source:
        arXiv 1604.06174.
    """
    for block in (*unet.input_blocks, unet.middle_block, *unet.output_blocks):
        block.recompute()
    inline(unet)


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
