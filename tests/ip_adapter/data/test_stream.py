"""The stream of a training: each row once an epoch whatever the batch and devices, randomness by position, threads."""
from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from ip_adapter.data.dataset import ImageTextDataset
from ip_adapter.data.stream import Batch, Loader, Stream, draws, samples_of
from ldm.errors import UserError
from ldm.sampling.schedule import NoiseSchedule

SHAPES = [(1, 1, 1), (1, 3, 2), (5, 8, 1), (7, 2, 1), (7, 3, 2), (10, 5, 2), (12, 4, 3), (100, 7, 1), (3, 20, 2)]


def epochs_of(length, batch, ranks, seed=3, epochs=3):
    """The rows of all ranks in the order of their positions, epoch by epoch."""
    streams = [Stream(length, batch, seed, ranks, rank) for rank in range(ranks)]
    steps = range(-(-length * epochs // (batch * ranks)))
    rows = np.concatenate([stream.rows(step) for step in steps for stream in streams])
    return rows[:length * epochs].reshape(epochs, length)


@pytest.mark.parametrize("length, batch, ranks", SHAPES)
def test_each_row_once_an_epoch(length, batch, ranks):
    for rows in epochs_of(length, batch, ranks):
        assert sorted(rows) == list(range(length))


@pytest.mark.parametrize("length, batch, ranks", SHAPES)
def test_devices_and_batches_do_not_change_the_order(length, batch, ranks):
    assert np.array_equal(epochs_of(length, batch, ranks), epochs_of(length, 1, 1))


def test_two_ranks_see_what_one_with_twice_the_batch_sees():
    one, two = Stream(11, 6, 0), [Stream(11, 3, 0, 2, rank) for rank in range(2)]
    for step in (0, 1, 2, 5, 1000):
        assert np.array_equal(one.positions(step), np.concatenate([stream.positions(step) for stream in two]))
        assert np.array_equal(one.rows(step), np.concatenate([stream.rows(step) for stream in two]))


def test_resuming_needs_the_step_only():
    whole = Stream(13, 4, 5)
    rows = [whole.rows(step) for step in range(20)]
    for step in (0, 3, 4, 19):
        assert np.array_equal(Stream(13, 4, 5).rows(step), rows[step])
    assert np.array_equal(whole.rows(2), rows[2])  # going back, after the first epochs have left the cache


def test_epochs_and_seeds_differ_and_repeat():
    epochs = epochs_of(50, 5, 1)
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])
    assert np.array_equal(epochs, epochs_of(50, 5, 1)) and not np.array_equal(epochs, epochs_of(50, 5, 1, seed=4))


def test_positions_and_the_order_without_shuffling():
    stream = Stream(5, 2, 0, 2, 1, shuffle=False)
    assert stream.positions(3).tolist() == [14, 15] and stream.positions(3).dtype == np.int64
    assert stream.rows(3).tolist() == [4, 0] and stream.rows(3).dtype == np.int64


def test_a_permutation_is_drawn_once_an_epoch(monkeypatch):
    drawn, default_rng = [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: drawn.append(seed[1]) or default_rng(seed))
    stream = Stream(10, 4, 0)
    for step in range(10):
        stream.rows(step)
    assert drawn == [0, 1, 2, 3]


def test_drops_are_five_percent_each_and_timesteps_uniform():
    samples = [draws(0, position, (1, 1, 1)) for position in range(20_000)]
    sigma = np.sqrt(20_000 * 0.05 * 0.95)
    for drops in ((True, False), (False, True), (True, True)):
        assert abs(sum((s.drop_image, s.drop_text) == drops for s in samples) - 1000) < 3 * sigma
    timesteps = np.array([s.timestep for s in samples])
    assert timesteps.min() == 0 and timesteps.max() == 999
    assert abs(timesteps.mean() - 499.5) < 3 * 288.7 / np.sqrt(20_000)


@pytest.mark.parametrize("p, drops", [((1, 0, 0), (True, False)), ((0, 1, 0), (False, True)), ((0, 0, 1), (True, True)),
                                      ((0, 0, 0), (False, False))])
def test_what_is_dropped(p, drops):
    assert all(draws(1, k, (1, 1, 1), *p)[3:] == drops for k in range(50))


def test_draws_depend_on_seed_and_position_only():
    a, b = draws(7, 12, (4, 8, 8)), draws(7, 12, (4, 8, 8))
    assert a[0] == b[0] and a[3:] == b[3:] and all(np.array_equal(x, y) for x, y in zip(a[1:3], b[1:3]))
    assert a.noise.shape == a.posterior.shape == (4, 8, 8) and a.noise.dtype == a.posterior.dtype == np.float32
    noises = [a.noise, a.posterior, draws(7, 13, (4, 8, 8)).noise, draws(8, 12, (4, 8, 8)).noise]
    assert all(abs(np.corrcoef(x.ravel(), y.ravel())[0, 1]) < 0.25 for i, x in enumerate(noises) for y in noises[:i])


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("k", [0.02, 1])
def test_timesteps_are_drawn_as_p2_weighs_errors(prediction, k):
    schedule = NoiseSchedule(prediction=prediction)
    alpha = schedule.alphas_cumprod()
    weights = 1 / (k + alpha / (1 - alpha))
    if prediction == "v":  # an error of v is one of the noise, 1 / sqrt(alpha) times as large
        weights *= alpha
    shares = schedule.timestep_shares(k)
    drawn = np.array([draws(3, position, (1, 1, 1), shares=shares).timestep for position in range(10_000)])
    got, expected = np.histogram(drawn, 10, (0, 1000))[0], 10_000 * weights.reshape(10, 100).sum(1) / weights.sum()
    assert (np.abs(got - expected) < 5 * np.sqrt(expected) + 1).all()
    assert schedule.timestep_shares(0) is None


def test_timestep_and_drops_do_not_depend_on_the_size_of_the_noise():
    for position in range(100):
        small, large = draws(2, position, (4, 2, 2)), draws(2, position, (4, 16, 8))
        assert small.timestep == large.timestep and small[3:] == large[3:]
        assert np.array_equal(small.noise.ravel(), large.noise.ravel()[:16])


def threads() -> list:
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_batches_equal_plain_computation(six):
    stream, make = Stream(6, 4, 1), samples_of(ImageTextDataset(six, 16, random_crop=True), 1)
    with Loader(stream, make, start=5, workers=3) as loader:
        for step, batch in zip(range(5, 9), loader):
            positions, rows = stream.positions(step), stream.rows(step)
            samples = [make(row, position) for row, position in zip(rows, positions)]
            assert isinstance(batch, Batch) and batch.step == step and np.array_equal(batch.positions, positions)
            assert np.array_equal(batch.pixels, [sample.pixels for sample in samples])
            assert np.array_equal(batch.clip_pixels, [sample.clip_pixels for sample in samples])
            assert batch.pixels.dtype == batch.clip_pixels.dtype == np.float32
            assert batch.texts == [sample.text for sample in samples]
            assert batch.rows.tolist() == [sample.index for sample in samples]
            assert batch.sizes.tolist() == [[30, 40, *sample.crop, *sample.pixels.shape[1:]] for sample in samples]


def numbers(step, positions, samples) -> tuple:
    return step, samples


def test_batches_come_in_order_however_long_each_sample_takes():
    def make(row, position):
        time.sleep(0.01 * (position % 3 == 0))
        return row
    with Loader(Stream(10, 4, 0), make, workers=4, collate=numbers) as loader:
        for expected, (step, rows) in zip(range(12), loader):
            assert step == expected and rows == Stream(10, 4, 0).rows(step).tolist()
    assert not threads()


def test_few_batches_are_made_ahead():
    made = []
    with Loader(Stream(10, 2, 0), lambda row, position: made.append(position), ahead=3, collate=numbers) as loader:
        for _ in loader:
            time.sleep(0.1)
            assert sorted(made) == list(range(8))  # the batch in use and three more
            break


def test_an_exception_is_raised_when_its_batch_is_due():
    def make(row, position):
        if position == 5:
            raise UserError("the sixth")
        return position
    seen = []
    with pytest.raises(UserError, match="the sixth"):
        for step, samples in Loader(Stream(10, 2, 0), make, collate=numbers):
            seen += samples
    assert seen == [0, 1, 2, 3] and not threads()


@pytest.mark.parametrize("exception", [KeyboardInterrupt, None])
def test_stopping_early_leaves_no_thread(exception):
    started = []

    def make(row, position):
        started.append(position)
        time.sleep(0.02)
    begun = time.perf_counter()
    try:
        with Loader(Stream(10, 50, 0), make, ahead=4, collate=numbers) as loader:
            for _ in loader:
                assert threads()
                if exception:
                    raise exception
                break
    except KeyboardInterrupt:
        assert exception
    assert not threads()
    assert len(started) < 60 and time.perf_counter() - begun < 2  # of the 250 that were asked for


def test_leaving_the_loop_closes_the_loader():
    for _ in Loader(Stream(10, 2, 0), lambda row, position: row, collate=numbers):
        break
    assert not threads()
