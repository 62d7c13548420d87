"""The training step: AdamW against the paper's formula, overflow, accumulation, averages, exact state."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops

import ip_adapter.training.step as training
from ip_adapter.training.step import (
    AdamW,
    NoisePredictionLoss,
    OptimizerConfig,
    TrainStep,
    learning_rate,
    recompute_blocks,
)
from ldm.modules.unet import UNetConfig, UNetModel


class Line(nn.Cell):
    """Mean squared error of a x + b."""

    def __init__(self):
        super().__init__()
        self.a = Parameter(Tensor(np.array([0.5, -0.25], np.float32)), "a")
        self.b = Parameter(Tensor(np.float32(0.1)), "b")

    def construct(self, x, y):
        return ops.square((self.a * x).sum(-1) + self.b - y).mean()


def batches(n: int, size: int = 4) -> list:
    rng = np.random.default_rng(0)
    return [(rng.standard_normal((size, 2)).astype(np.float32), rng.standard_normal(size).astype(np.float32))
            for _ in range(n)]


def make(config=OptimizerConfig(), loss=None, **kwargs) -> TrainStep:
    loss = loss or Line()
    return TrainStep(loss, AdamW({"a": loss.a, "b": loss.b}, config), **kwargs)


def train(step: TrainStep, data: list, rate: float = 0.01) -> list:
    n = step.accumulation
    return [step(Tensor(rate, ms.float32), Tensor(i % n == 0), i % n == n - 1, Tensor(x), Tensor(y))
            for i, (x, y) in enumerate(data)]


def by_formula(data: list, config: OptimizerConfig, rate: float = 0.01) -> np.ndarray:
    """arXiv 1711.05101, algorithm 2, in float64; returns a, b and their averages."""
    p = np.array([0.5, -0.25, np.float32(0.1)])
    m, v, average = np.zeros(3), np.zeros(3), p.copy()
    for t, (x, y) in enumerate(data, 1):
        error = 2 * (x @ p[:2] + p[2] - y) / len(y)
        g = np.append(error @ x, error.sum())
        if config.max_grad_norm:
            g = g * min(1, config.max_grad_norm / np.sqrt(g @ g))
        m, v = config.beta1 * m + (1 - config.beta1) * g, config.beta2 * v + (1 - config.beta2) * g * g
        m_hat, v_hat = m / (1 - config.beta1**t), v / (1 - config.beta2**t)
        p = p - rate * (m_hat / (np.sqrt(v_hat) + config.epsilon) + config.weight_decay * p)
        average = config.ema_decay * average + (1 - config.ema_decay) * p
    return np.concatenate([p, average])


@pytest.fixture(params=[(0, 2), (1, 3), (1, 0)], ids=["graph", "pynative, all packed", "pynative, none packed"])
def mode(request, monkeypatch):
    """The mode, and from how many elements on a parameter is updated by itself; `a` has 2, `b` 1."""
    mode, packed = request.param
    monkeypatch.setattr(training, "PACKED", packed)
    ms.set_context(mode=mode)
    yield mode
    ms.set_context(mode=1)


@pytest.mark.parametrize("config", [OptimizerConfig(), OptimizerConfig(weight_decay=0.3, max_grad_norm=0.2),
                                    OptimizerConfig(ema_decay=0.9, loss_scale=1024.0, scale_window=4),
                                    OptimizerConfig(beta1=0.0), OptimizerConfig(beta2=0.0),
                                    OptimizerConfig(beta1=0.0, beta2=0.0)])
def test_adamw_is_the_papers(mode, config):
    step, data = make(config), batches(20)
    results = train(step, data)
    assert all(bool(finite) for _, finite in results)
    expected = by_formula(data, config)
    state = step.optimizer.state()
    got = np.append(state["parameter.a"], state["parameter.b"])
    # The operator computes v + (g * g - v): with beta2 0 a small g that follows a large one is rounded more.
    np.testing.assert_allclose(got, expected[:3], rtol=1e-5, atol=0 if config.beta2 else 2e-6)
    trained = step.optimizer.trained()
    np.testing.assert_allclose(np.append(trained["a"], trained["b"]), expected[3:] if config.ema_decay else got,
                               rtol=1e-5)
    if config.scale_window:  # 20 good steps, a window of 4
        assert state["loss_scale"] == 1024 * 2**5 and state["good_steps"] == 0


def test_an_overflow_changes_nothing_but_the_scale(mode):
    step = make(OptimizerConfig(ema_decay=0.9, loss_scale=1024.0, scale_window=10))
    data = batches(3)
    train(step, data)
    before = step.optimizer.state()
    bad = (np.full((4, 2), np.inf, np.float32), data[0][1])
    (_, finite), = train(step, [bad])
    after = step.optimizer.state()
    assert not bool(finite) and after["loss_scale"] == 512 and after["good_steps"] == 0
    for name in set(before) - {"loss_scale", "good_steps"}:
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)
    (_, finite), = train(step, data[:1])
    assert bool(finite) and step.optimizer.state()["updates"] == 4


def test_accumulated_batches_equal_one_large(mode):
    small = batches(6)
    large = [tuple(np.concatenate(pair) for pair in zip(*small[i : i + 3])) for i in (0, 3)]
    accumulating, whole = make(accumulation=3), make()
    train(accumulating, small)
    train(whole, large)
    a, b = accumulating.optimizer.state(), whole.optimizer.state()
    assert a["updates"] == b["updates"] == 2
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-8, err_msg=name)


def test_a_loaded_state_goes_on_bit_for_bit(mode):
    config, data = OptimizerConfig(ema_decay=0.5, loss_scale=8.0, scale_window=3), batches(12)
    straight = make(config)
    train(straight, data)
    first, second = make(config), make(config)
    train(first, data[:5])
    second.optimizer.load_state(first.optimizer.state())
    train(second, data[5:])
    expected, got = straight.optimizer.state(), second.optimizer.state()
    assert expected.keys() == got.keys()
    for name in expected:
        np.testing.assert_array_equal(expected[name], got[name], err_msg=name)


def test_to_compute_with_what_is_published_changes_no_training(mode):
    """The network holds the averages within the block only; the training goes on bit for bit."""
    config, data = OptimizerConfig(ema_decay=0.9), batches(12)
    network = Line()
    straight, watched = make(config), make(config, network)
    train(straight, data)
    train(watched, data[:5])
    x, y = (Tensor(array) for array in data[0])
    trained, line = watched.optimizer.trained(), Line()
    line.a.set_data(Tensor(trained["a"].copy()))
    line.b.set_data(Tensor(trained["b"].copy()))
    with watched.optimizer.publishing():
        for name, parameter in zip(watched.optimizer.names, watched.optimizer.parameters):
            np.testing.assert_array_equal(parameter.asnumpy(), trained[name])
        assert float(network(x, y).asnumpy()) == float(line(x, y).asnumpy())
    assert float(network(x, y).asnumpy()) != float(line(x, y).asnumpy())
    train(watched, data[5:])
    expected, got = straight.optimizer.state(), watched.optimizer.state()
    for name in expected:
        np.testing.assert_array_equal(expected[name], got[name], err_msg=name)


def test_the_scale_can_fall_until_it_is_one():
    for config, expected in ((OptimizerConfig(), False), (OptimizerConfig(loss_scale=2.0, scale_window=9), True),
                             (OptimizerConfig(loss_scale=1.0, scale_window=9), False),
                             (OptimizerConfig(loss_scale=2.0), False),
                             (OptimizerConfig(loss_scale=2.0, loss_scale_factor=1.0, scale_window=9), False)):
        assert make(config).optimizer.scale_can_fall() is expected


def test_a_state_that_does_not_fit_is_refused_whole():
    optimizer = make().optimizer
    state = optimizer.state()
    with pytest.raises(KeyError):
        optimizer.load_state({name: value for name, value in state.items() if name != "mean.b"})
    with pytest.raises(ValueError, match="`mean.a` has shape"):
        optimizer.load_state({**state, "parameter.b": np.float32(9), "mean.a": np.zeros(3, np.float32)})
    assert optimizer.state()["parameter.b"] == np.float32(0.1)


def test_learning_rates():
    assert [learning_rate(s, 1.0, 4, 100) for s in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    assert learning_rate(0, 1e-4, 0, 10) == 1e-4
    cosine = [learning_rate(s, 1.0, 10, 110, 0.1) for s in range(111)]
    assert cosine[10] == 1.0 and cosine[110] == pytest.approx(0.1) and cosine[60] == pytest.approx(0.55)
    assert all(a >= b for a, b in zip(cosine[10:], cosine[11:]))


def test_recomputed_activations_give_the_same_gradients():
    """In graph mode, of a small UNet that is told a vector and no picture."""
    config = UNetConfig(model_channels=32, channel_mult=(1,), num_res_blocks=1, transformer_depth=(1,),
                        context_dim=16, num_heads=2, use_linear=True, adm_in_channels=8)
    rng, unet = np.random.default_rng(0), UNetModel(config)
    for _, parameter in unet.parameters_and_names():
        parameter.set_data(Tensor(0.1 * rng.standard_normal(parameter.shape).astype(np.float32)))
    x, noise, text, vector = (Tensor(rng.standard_normal(shape).astype(np.float32)) for shape in (
        (2, 4, 8, 8), (2, 4, 8, 8), (2, 5, 16), (2, 8)))
    batch = x, Tensor(np.array([3, 700], np.float32)), noise, text, vector
    weights = list(unet.get_parameters())
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        kept = ms.value_and_grad(NoisePredictionLoss(unet), None, weights)(*batch)
        recompute_blocks(unet)
        again = ms.value_and_grad(NoisePredictionLoss(unet), None, weights)(*batch)
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)
    assert float(again[0].asnumpy()) == pytest.approx(float(kept[0].asnumpy()), rel=1e-5)
    for one, other, weight in zip(kept[1], again[1], weights):
        np.testing.assert_allclose(one.asnumpy(), other.asnumpy(), rtol=1e-3, atol=1e-5, err_msg=weight.name)
