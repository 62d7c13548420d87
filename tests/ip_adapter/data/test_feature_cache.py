"""Kept features: whatever happens to the file, what is read is what the encoders give, or one line says why not."""
from __future__ import annotations

import logging
import os
import random

import numpy as np
import pytest

from ip_adapter.data.dataset import ImageTextDataset
from ip_adapter.data.feature_cache import VERSION, FeatureCache, sample_key
from ip_adapter.data.features import Features
from ip_adapter.data.stream import stack
from ldm.errors import UserError
from tests.support.dummies import write_csv

SIZE = 8, 8


class Encoders:
    """Features that follow from an image and its caption; counts the samples."""

    fingerprint, count = "of these", 0

    def shapes(self, size: tuple) -> tuple:
        return (4, 1, 1), (4, 1, 1), (3, 2), (0,), (5,), (6,)

    def features(self, batch) -> Features:
        self.count += len(batch.texts)
        seeds = [[int(pixels.sum() * 100) % 997, *text.encode()] for pixels, text in zip(batch.pixels, batch.texts)]
        parts = [np.stack([np.random.default_rng([n, *seed]).normal(size=shape) for seed in seeds]).astype(np.float16)
                 for n, shape in enumerate(self.shapes(SIZE)[:5])]
        return Features(*parts, batch.sizes)


@pytest.fixture
def dataset(six):
    return ImageTextDataset(six, 8)


def filled(folder, dataset, rows=None) -> FeatureCache:
    cache = FeatureCache(folder, Encoders(), SIZE)
    cache.fill(dataset, 2, rows)
    return cache


def kept(cache: FeatureCache, count: int = 6) -> Features:
    return cache.collate(0, np.arange(count), [cache.sample(row, 0) for row in range(count)]).features


def assert_same(a: Features, b: Features) -> None:
    for name, one, other in zip(Features._fields, a, b):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other, err_msg=name)


@pytest.fixture
def right(tmp_path, dataset) -> Features:
    return kept(filled(tmp_path / "right", dataset))


def test_what_is_kept_is_what_the_encoders_give(tmp_path, dataset, right):
    encoders = Encoders()
    for row in (0, 1, 4, 5):
        expected = encoders.features(stack(0, np.arange(1), [dataset.sample(row, None)]))
        assert_same(Features(*(part[row : row + 1] for part in right)), expected)
    again = FeatureCache(tmp_path / "right", Encoders(), SIZE)
    again.fill(dataset, 2)
    assert again.encoders.count == 0
    assert_same(kept(again), right)


def test_only_what_is_new_is_computed(tmp_path, dataset, right):
    cache = filled(tmp_path / "cache", dataset, [0, 5])
    before = cache.path.read_bytes()
    cache = filled(tmp_path / "cache", dataset)
    assert cache.encoders.count == 2 and cache.path.read_bytes().startswith(before)
    assert_same(kept(cache), right)
    write_csv(dataset.csv.parent, "dir,text\n5.png,picture 5\n0.png,another text\n")
    changed = ImageTextDataset(dataset.csv.parent, 8)
    cache = filled(tmp_path / "cache", changed)
    assert cache.encoders.count == 1
    np.testing.assert_array_equal(kept(cache, 2).text[0], right.text[5])


def mutated(content: bytes, size: int, rng: random.Random) -> bytes:
    """Records flipped, cut, doubled, shifted, exchanged, overwritten, or keys moved to other records."""
    records = [content[at : at + size] for at in range(0, len(content), size)]
    heads, bodies = [one[4:36] for one in records], [one[36:] for one in records]
    a, b = rng.sample(range(len(records)), 2)
    kind = rng.randrange(10)
    if kind == 0:
        bad = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        return bytes(bad)
    if kind == 1:
        return content[: rng.randrange(len(content))]
    if kind == 2:
        return b"".join(records[:a] + [records[b]] + records[a:])
    if kind == 3:
        return b"".join(records[::-1])
    if kind == 4:
        at = rng.randrange(len(content))
        return content[:at] + rng.randbytes(rng.randint(0, 9)) + content[at + rng.randint(0, 9):]
    if kind == 5:
        heads = rng.choice([heads[::-1], heads[1:] + heads[:1]])
    elif kind == 6:
        bodies[a] = bodies[b]
    elif kind == 7:
        return bytes(rng.choice([content[:at] + bytes(len(content) - at) for at in range(0, len(content), 7)]))
    elif kind == 8:
        return content.decode("latin-1").encode("utf-16")
    else:
        return rng.randbytes(rng.randint(0, 2 * len(content)))
    return b"".join(one[:4] + head + body for one, head, body in zip(records, heads, bodies))


def test_a_damaged_cache_never_gives_wrong_features(tmp_path, dataset, right, caplog):
    cache, rng, computed = filled(tmp_path / "cache", dataset), random.Random(0), 0
    good, size = cache.path.read_bytes(), cache.record.itemsize
    for _ in range(300):
        bad = mutated(good, size, rng)
        cache.path.write_bytes(bad)
        caplog.clear()
        again = filled(tmp_path / "cache", dataset)
        assert_same(kept(again), right)
        whole = {good[at : at + size] for at in range(0, len(good), size)}
        damaged = len(bad) // size - len(whole & {bad[at : at + size] for at in range(0, len(bad), size)})
        said = [record.message for record in caplog.records]
        assert len(said) == (damaged > 0) and all(f" {damaged} of {len(bad) // size} records" in line for line in said)
        computed += again.encoders.count
        assert len(again.path.read_bytes()) < max(len(bad), len(good)) + size
        assert filled(tmp_path / "cache", dataset).encoders.count == 0
    assert computed > 300


def test_a_change_while_in_use_is_one_line(tmp_path, dataset):
    cache = filled(tmp_path / "cache", dataset)
    good, size = cache.path.read_bytes(), cache.record.itemsize
    for bad in (good[::-1], b"", b"".join(good[at : at + size] for at in range(len(good) - size, -1, -size))):
        cache.path.write_bytes(bad)
        with pytest.raises(UserError, match="was changed while it was in use"):
            kept(cache)
    cache.path.write_bytes(good)
    cache.path.unlink()
    kept(cache)  # a cache may be deleted at any time


def test_features_of_another_model_are_not_taken(tmp_path, dataset, right):
    cache = filled(tmp_path / "cache", dataset)
    other = Encoders()
    other.fingerprint = "of others"
    other = FeatureCache(tmp_path / "cache", other, SIZE)
    cache.path.rename(other.path)
    other.fill(dataset, 2)
    assert other.encoders.count == 4


def test_an_older_cache_is_made_anew_with_a_notice(tmp_path, dataset, right, caplog):
    cache = FeatureCache(tmp_path / "cache", Encoders(), SIZE)
    older = cache.path.with_name(cache.path.name.replace(f".{VERSION}", ""))
    older.parent.mkdir()
    older.write_bytes(bytes(4 * (cache.record.itemsize - 36)))
    older.with_suffix(".keys").write_text("".join(f"{sample_key(dataset, row)}\n" for row in (0, 1, 4, 5)))
    cache.fill(dataset, 2)
    assert_same(kept(cache), right)
    assert [record.message.count("is of another version") for record in caplog.records] == [1]
    assert older.exists()
    caplog.clear()
    filled(tmp_path / "cache", dataset)
    assert not caplog.records


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/full")])
def test_what_is_no_file_is_one_line(tmp_path, dataset, make):
    cache = FeatureCache(tmp_path, Encoders(), SIZE)
    make(cache.path)
    with pytest.raises(UserError, match="cannot be written") as error:
        cache.fill(dataset, 2)
    assert "\n" not in str(error.value) and cache.path.name in str(error.value)


@pytest.fixture(autouse=True)
def notices(caplog):
    caplog.set_level(logging.WARNING, "ip_adapter.data.feature_cache")
