"""The stream of a training: the order of samples, the randomness of each, and batches made ahead.

All of it follows from the seed and a sample's position in the endless stream, so neither the batch size nor the number
of devices nor an interruption changes what is seen.
"""
from __future__ import annotations

import functools
import itertools
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, Iterator, NamedTuple

import numpy as np

from ip_adapter.data.dataset import ImageTextDataset, Sample
from ldm.sampling.schedule import TRAIN_STEPS


class Batch(NamedTuple):
    """The samples of one step on one device."""

    step: int
    positions: np.ndarray  # (B,) int64, places in the stream: they decide the random numbers, see `draws`
    pixels: np.ndarray  # (B, 3, height, width) float32 in [-1, 1]
    clip_pixels: np.ndarray  # (B, 3, 224, 224) float32
    texts: list
    sizes: np.ndarray  # (B, 6) int32: (height, width) before resizing, (top, left) of the crop, (height, width) of it
    rows: np.ndarray  # (B,) int64, the rows really used


class Draw(NamedTuple):
    """The random numbers of one training sample, see `draws`."""

    timestep: int  # 0 to 999
    noise: np.ndarray  # (C, H, W) float32 standard normal, to be added to the latent
    posterior: np.ndarray  # (C, H, W) float32 standard normal, to sample the autoencoder's posterior
    drop_image: bool  # train with the unconditional picture tokens
    drop_text: bool  # train with an empty caption


class Stream:
    """The endless order of samples, cut into batches; resuming needs the number of the step only.

    Position k is entry k % length of the permutation of epoch k // length, so every row is seen once an epoch and all
    batches are full. A step takes batch * ranks positions, each rank its own `batch` of them: two ranks see together,
    in this order, what one rank with twice the batch sees.

    Args:
        length: number of rows.
        batch: samples a step on one rank.
        seed: of the permutations, 0 or more.
        ranks: number of devices.
        rank: this device, from 0.
        shuffle: rows come in their own order without.
    """

    def __init__(self, length: int, batch: int, seed: int, ranks: int = 1, rank: int = 0, shuffle: bool = True):
        assert length > 0 and batch > 0 and 0 <= rank < ranks, (length, batch, rank, ranks)
        self.length, self.batch, self.ranks, self.rank, self.shuffle = length, batch, ranks, rank, shuffle
        self._order = functools.lru_cache(maxsize=2)(  # two: a batch may lie across the border of epochs
            lambda epoch: np.random.default_rng([seed, epoch, 2]).permutation(length))

    def positions(self, step: int) -> np.ndarray:
        """(batch,) int64: this rank's places in the stream."""
        return (step * self.ranks + self.rank) * self.batch + np.arange(self.batch, dtype=np.int64)

    def rows(self, step: int) -> np.ndarray:
        """(batch,) int64: the rows at these places."""
        epochs, rows = np.divmod(self.positions(step), self.length)
        if self.shuffle:
            for epoch in np.unique(epochs):
                here = epochs == epoch
                rows[here] = self._order(int(epoch))[rows[here]]
        return rows


def draws(seed: int, position: int, shape: tuple, p_image: float = 0.05, p_text: float = 0.05,
          p_both: float = 0.05, shares: np.ndarray | None = None) -> Draw:
    """All random numbers of one training sample; they depend on seed and position only.

    They are drawn in this order: timestep, the one uniform number that decides what is dropped, noise, posterior; so
    timestep and drops are the same for latents of any size.

    Args:
        seed: 0 or more.
        position: of the sample in the stream.
        shape: (C, H, W) of a latent.
        p_image: share of samples that lose the picture only.
        p_text: share that loses the text only.
        p_both: share that loses both.
        shares: (1000,) of the timesteps (`NoiseSchedule.timestep_shares`); None for all alike.

    Source:
        tencent-ailab/IP-Adapter: tutorial_train.py, for the one draw and its order; the random streams are ours.
    """
    rng = np.random.default_rng([seed, position])
    timestep = int(rng.integers(TRAIN_STEPS) if shares is None else rng.choice(TRAIN_STEPS, p=shares))
    u = rng.random()
    noise, posterior = (rng.standard_normal(shape, np.float32) for _ in range(2))
    kind = np.searchsorted(np.cumsum([p_image, p_text, p_both]), u, "right")  # 0 image, 1 text, 2 both, 3 nothing
    return Draw(timestep, noise, posterior, drop_image=kind in (0, 2), drop_text=kind in (1, 2))


def samples_of(dataset: ImageTextDataset, seed: int) -> Callable[[int, int], Sample]:
    """How `Loader` makes samples from pictures: (row, position) -> Sample, crops drawn independently of `draws`."""
    return lambda row, position: dataset.sample(row, np.random.default_rng([seed, position, 1]))


def stack(step: int, positions: np.ndarray, samples: list[Sample]) -> Batch:
    """Put samples together."""
    pixels, clips, texts, originals, crops, rows = zip(*samples)
    sizes = [(*original, *crop, *picture.shape[1:]) for original, crop, picture in zip(originals, crops, pixels)]
    return Batch(step, positions, np.stack(pixels), np.stack(clips), list(texts), np.array(sizes, np.int32),
                 np.array(rows, np.int64))


class Loader:
    """Batches in order, without end, made by threads ahead of need. A context manager, and an iterable to use once.

    Args:
        stream: which samples.
        make: (row, position) -> one sample; called in several threads.
        start: step of the first batch.
        workers: number of threads.
        ahead: batches under way or ready while one is used.
        collate: (step, positions, samples) -> batch.
    """

    def __init__(self, stream: Stream, make: Callable, start: int = 0, workers: int = 2, ahead: int = 2,
                 collate: Callable = stack):
        self.stream, self.make, self.start, self.ahead, self.collate = stream, make, start, ahead, collate
        self._pool, self._closed = ThreadPoolExecutor(workers, "loader"), False

    def __iter__(self) -> Iterator:
        """The batches; what a thread raises is raised here, when its batch is due."""
        waiting = deque()
        try:
            for step in itertools.count(self.start):
                positions = self.stream.positions(step)
                waiting.append((step, positions, [
                    self._pool.submit(self.make, int(row), int(position))
                    for row, position in zip(self.stream.rows(step), positions)]))
                if len(waiting) > self.ahead:
                    step, positions, futures = waiting.popleft()
                    yield self.collate(step, positions, [future.result() for future in futures])
        finally:
            self.close()

    def close(self) -> None:
        """Drop what is not begun and wait for what is, a sample for each thread at most."""
        if not self._closed:  # a forgotten iterator calls this again when Python exits, which the pool does not take
            self._closed = True
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception) -> None:
        self.close()
