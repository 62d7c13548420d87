"""Aspect-ratio buckets: pictures of one batch share a size near their own proportions, so that little is cut off."""
from __future__ import annotations

import heapq
import logging
import math
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from ip_adapter.data.dataset import ImageTextDataset
from ip_adapter.data.stream import Stream
from ip_adapter.images.preprocess import shown_size
from ldm.errors import UserError

MAX_RATIO = 2.0  # of the sides of a bucket; what is longer is cropped

log = logging.getLogger(__name__)


class Buckets(NamedTuple):
    """Sizes, and which rows of a data set are trained at each."""

    sizes: list  # (height, width) in pixels
    of_row: np.ndarray  # (rows,) int64: index into `sizes`
    members: list  # the rows of each size, int64 arrays

    def size_of(self, row: int) -> tuple:
        """(height, width) at which a row is trained."""
        return self.sizes[self.of_row[row]]


def bucket_sizes(size: int) -> list:
    """(height, width) of all buckets with about `size` x `size` pixels, never more, from tall to wide.

    Sides are multiples of a sixteenth of `size`, and of 8: 64 for 1024 as in SDXL (arXiv 2307.01952, appendix I).
    """
    step = max(8, size // 128 * 8)
    sizes = {(size, size)}
    for side in range(step, size + 1, step):
        other = size * size // side // step * step
        if other <= MAX_RATIO * side:
            sizes |= {(other, side), (side, other)}
    return sorted(sizes, key=lambda pair: pair[1] / pair[0])


def one_bucket(rows: int, size: int) -> Buckets:
    """All pictures in squares."""
    return Buckets([(size, size)], np.zeros(rows, np.int64), [np.arange(rows)])


def find_buckets(dataset: ImageTextDataset, size: int, batch: int, workers: int) -> Buckets:
    """Put every picture into the bucket nearest its proportions.

    A bucket that could not fill one batch is given up; its pictures go where they fit next best.

    Args:
        dataset: whose pictures' headers are read.
        size: side of the square with as many pixels as a bucket has.
        batch: samples of one step over all devices.
        workers: threads that read.
    """
    sizes = bucket_sizes(size)
    with ThreadPoolExecutor(workers) as pool:
        ratios = np.fromiter(tqdm(pool.map(lambda row: proportions(dataset, row), range(len(dataset)), chunksize=256),
                                  total=len(dataset), desc="reading sizes", unit="picture", disable=None), float)
    of_row = _nearest(ratios, sizes)
    full = np.bincount(of_row, minlength=len(sizes)) >= batch
    if not full.any():
        return one_bucket(len(dataset), size)
    sizes = [one for one, kept in zip(sizes, full) if kept]
    of_row = _nearest(ratios, sizes)
    members = [np.flatnonzero(of_row == n) for n in range(len(sizes))]
    log.info("buckets: %s", ", ".join(f"{height}x{width} ({len(rows)})" for (height, width), rows in
                                      zip(sizes, members)))
    return Buckets(sizes, of_row, members)


def proportions(dataset: ImageTextDataset, row: int) -> float:
    """Width over height as it is shown, read off the header; 1 if it cannot be read, which is reported later."""
    try:
        width, height = shown_size(dataset.path(row))
    except UserError:
        return 1.0
    return width / height


def _nearest(ratios: np.ndarray, sizes: list) -> np.ndarray:
    distances = np.abs(np.log(ratios)[:, None] - np.array([math.log(w / h) for h, w in sizes]))
    return distances.argmin(1)


class BucketStream:
    """As `Stream`, every batch from one bucket; with one bucket it is `Stream`.

    Each bucket goes through its own rows again and again, and the buckets take turns so that all are as far: batch j of
    one with n rows is due at (j + 1/2) / n.

    Args:
        buckets: at least a batch over all ranks in each, unless there is only one.
        batch: samples a step on one rank.
        seed: of the permutations.
        ranks: number of devices.
        rank: this device, from 0.
    """

    def __init__(self, buckets: Buckets, batch: int, seed: int, ranks: int = 1, rank: int = 0):
        self.members = buckets.members
        self.streams = [Stream(len(rows), batch, seed + n, ranks, rank) for n, rows in enumerate(self.members)]
        self._due = [(0.5 / len(rows), n, 0) for n, rows in enumerate(self.members)]
        heapq.heapify(self._due)
        self._turns: list = []  # (bucket, its batch) of every step so far

    def positions(self, step: int) -> np.ndarray:
        """(batch,) int64: this rank's places in the stream."""
        return self.streams[0].positions(step)

    def rows(self, step: int) -> np.ndarray:
        """(batch,) int64: the rows at these places."""
        bucket, batch = self.turn(step)
        return self.members[bucket][self.streams[bucket].rows(batch)]

    def turn(self, step: int) -> tuple:
        """Whose turn it is, and for the how-manieth time."""
        while len(self._turns) <= step:
            _, bucket, batch = self._due[0]
            heapq.heapreplace(self._due, ((batch + 1.5) / len(self.members[bucket]), bucket, batch + 1))
            self._turns.append((bucket, batch))
        return self._turns[step]
