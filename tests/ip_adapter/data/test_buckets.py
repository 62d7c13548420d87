"""Aspect-ratio buckets: sizes, assignment, and an order in which every picture comes once an epoch."""
from __future__ import annotations

import csv

import numpy as np
import pytest
from PIL import Image

from ip_adapter.data.buckets import Buckets, BucketStream, bucket_sizes, find_buckets, one_bucket
from ip_adapter.data.dataset import ImageTextDataset
from ip_adapter.data.stream import Stream


@pytest.mark.parametrize("size, step", [(1024, 64), (768, 48), (512, 32), (96, 8)])
def test_sizes(size, step):
    sizes = bucket_sizes(size)
    assert (size, size) in sizes and len(sizes) == len(set(sizes)) >= 7
    for height, width in sizes:
        assert height % step == 0 and width % step == 0 and (width, height) in sizes
        assert max(height, width) <= 2 * min(height, width)
        assert size * size - step * max(height, width) < height * width <= size * size


@pytest.fixture
def mixed(tmp_path):
    """Pictures of several proportions; one lies on its side by its EXIF tag, one cannot be read."""
    shapes = [(80, 40)] * 6 + [(40, 80)] * 5 + [(64, 60)] * 9 + [(90, 60)]
    rows = []
    for n, size in enumerate(shapes):
        picture, exif = Image.new("RGB", size, (n, n, n)), Image.Exif()
        if n == 0:  # shown as 40 x 80
            exif[0x0112] = 6
        picture.save(tmp_path / f"{n}.jpg", exif=exif)
        rows.append([f"{n}.jpg", f"text {n}"])
    (tmp_path / "19.jpg").write_bytes(b"no picture")
    with open(tmp_path / "img_txt.csv", "w", newline="") as file:
        csv.writer(file).writerows([["dir", "text"], *rows])
    return ImageTextDataset(tmp_path, 64)


def test_every_picture_goes_where_it_fits(mixed):
    """The 90 x 60 picture alone would not fill a batch, so it goes where it fits next best."""
    buckets = find_buckets(mixed, 64, 4, 2)
    by_row = [buckets.sizes[n] for n in buckets.of_row]
    assert by_row[1:6] == [(40, 88)] * 5 or by_row[1:6] == [(48, 80)] * 5
    assert by_row[0] == by_row[6] == by_row[1][::-1]
    assert by_row[11:20] == [(64, 64)] * 9
    assert by_row[20] in ((64, 64), by_row[1])
    assert sorted(np.concatenate(buckets.members)) == list(range(21))
    assert find_buckets(mixed, 64, 100, 2).sizes == [(64, 64)]


def test_samples_have_their_buckets_size_also_in_place_of_a_broken_one(mixed):
    buckets = find_buckets(mixed, 64, 4, 2)
    mixed.size_of_row = buckets.size_of
    for row in range(len(mixed)):
        sample = mixed.sample(row, None)
        assert sample.pixels.shape[1:] == buckets.sizes[buckets.of_row[row]]
        assert sample.index == (20 if row == 19 else row)


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_picture_once_an_epoch_and_every_batch_of_one_size(ranks):
    of_row = np.random.default_rng(0).choice(3, 120, p=[0.2, 0.5, 0.3])
    members = [np.flatnonzero(of_row == n) for n in range(3)]
    buckets = Buckets([(8, 8), (8, 16), (16, 8)], of_row, members)
    streams = [BucketStream(buckets, 4 // ranks, 7, ranks, rank) for rank in range(ranks)]
    whole, seen = BucketStream(buckets, 4, 7), []
    for step in range(90):  # three epochs
        rows = np.concatenate([stream.rows(step) for stream in streams])
        np.testing.assert_array_equal(rows, whole.rows(step))  # two devices see together what one does
        assert len(set(of_row[rows])) == 1
        seen.extend(rows)
        counts = np.bincount(seen, minlength=120)
        assert counts.max() - counts.min() <= 2  # a bucket is at most a batch ahead of its share
        for rows_of_bucket in members:  # within a bucket, all once before any twice
            assert counts[rows_of_bucket].max() - counts[rows_of_bucket].min() <= 1
    assert abs(np.bincount(seen, minlength=120) - 3).max() <= 1
    positions = np.concatenate([np.concatenate([stream.positions(step) for stream in streams]) for step in range(9)])
    assert positions.tolist() == list(range(36))  # so no two samples share their random numbers
    late = BucketStream(buckets, 4, 7)
    np.testing.assert_array_equal(late.rows(77), whole.rows(77))  # as after a resume


def test_one_bucket_is_the_plain_stream():
    plain, one = Stream(10, 3, 5), BucketStream(one_bucket(10, 64), 3, 5)
    for step in range(9):
        np.testing.assert_array_equal(one.rows(step), plain.rows(step))
        np.testing.assert_array_equal(one.positions(step), plain.positions(step))
