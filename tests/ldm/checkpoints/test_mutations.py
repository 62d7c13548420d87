"""Files damaged at random, and files of shapes nobody has: they work, or one line says why not; soon, in little memory.

The seeds are fixed, so a failure comes back; its message names the seed.
"""
from __future__ import annotations

import json
import random
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from ldm.checkpoints.file import open_checkpoint, save_arrays
from ldm.checkpoints.loading import View
from ldm.errors import UserError
from tests.support.architectures import LAYOUTS, READERS, SHAPES, tensors_of
from tests.support.checkpoints import torch_dict, torch_tensor, write_torch

KINDS = ["safetensors", "ckpt", "bin"]
SECONDS, BYTES = 2.0, 64 << 20  # for one file of a few KB
JUNK = [None, True, -1, 0, 1.5, 2**63, 10**30, "", "F32", "I64", "BOOL", "F99", [], [0], [1, 2, 3], {}, [[1]], "x" * 99]
ODD = [(), (0,), (1,), (7,), (0, 4), (4, 0), (3, 5), (2, 2, 2), (1, 1, 1, 1), (0, 4, 3, 3), (1,) * 9]
SHAPES_ON_DISK = {name: info.shape for part, layout in LAYOUTS.items()
                  for name, info in tensors_of(layout, SHAPES[part]).items()}


def write(path: Path, shapes: dict) -> None:
    """A file of these shapes, in the format that its ending names."""
    if path.suffix != ".bin":
        save_arrays(path, {name: np.ones(shape, np.float16) for name, shape in shapes.items()})
        return
    items, storages = {}, {}
    for key, (name, shape) in enumerate(shapes.items()):
        strides = [int(np.prod(shape[i + 1:])) for i in range(len(shape))]
        items[name] = torch_tensor(str(key), int(np.prod(shape)), shape, strides, kind="HalfStorage")
        storages[str(key)] = bytes(2 * int(np.prod(shape)))
    write_torch(path, torch_dict(items), storages)


def outcome(path: Path) -> tuple:
    """Open a file, list the sizes of all networks and read all tensors: (how many sizes, how many tensors) were got.

    What is refused has to be refused in one line.
    """
    sizes = tensors = 0
    try:
        with open_checkpoint(path) as file:
            for part, layout in LAYOUTS.items():
                try:
                    sizes += READERS[part](View(file.tensors, layout)) is not None
                except UserError as error:
                    assert "\n" not in str(error)
            for name, info in file.tensors.items():
                assert file.read(name).shape == info.shape
                tensors += 1
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error)
    return sizes, tensors


def bounded(path: Path, seed) -> tuple:
    """The same, within bounds."""
    began = time.monotonic()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        found = outcome(path)
    except Exception as error:
        pytest.fail(f"seed {seed}: {type(error).__name__}: {error}")
    assert tracemalloc.get_traced_memory()[1] - before < BYTES, f"seed {seed}"
    assert time.monotonic() - began < SECONDS, f"seed {seed}"
    return found


@pytest.fixture(autouse=True)
def traced():
    """Memory is watched."""
    tracemalloc.start()
    yield
    tracemalloc.stop()


def mutated(content: bytes, rng: random.Random, busy: range) -> bytes:
    """The bytes of a file with one to four changes, most of them in `busy`, where its index is."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.choice(busy) if rng.random() < 0.8 else rng.randrange(len(data) + 1)
        at, length = min(at, len(data)), rng.choice([1, 1, 2, 8, 100])
        kind = rng.choice(["flip", "flip", "insert", "delete", "repeat", "truncate"])
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == "insert":
            data[at:at] = rng.choice([rng.randbytes(length), b"\xff" * length, bytes(length), b"9" * length])
        elif kind == "delete":
            del data[at : at + length]
        elif kind == "repeat":
            data[at:at] = data[at : at + length]
        elif kind == "truncate" and rng.random() < 0.3:
            del data[at:]
    return bytes(data)


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_itself_has_all_sizes(kind, tmp_path):
    write(tmp_path / f"x.{kind}", SHAPES_ON_DISK)
    assert bounded(tmp_path / f"x.{kind}", "none") == (len(LAYOUTS), len(SHAPES_ON_DISK))


@pytest.mark.parametrize("kind", KINDS)
def test_random_changes(kind, tmp_path):
    path = tmp_path / f"x.{kind}"
    write(path, SHAPES_ON_DISK)
    content = path.read_bytes()
    busy = {"safetensors": range(3000), "ckpt": range(len(content)), "bin": range(5000)}[kind]
    read = 0
    for seed in range(400):
        path.write_bytes(mutated(content, random.Random(seed), busy))
        read += bounded(path, seed)[1] > 0
    assert read >= 10  # some changes do no harm, so reading was tried as well


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_odd_shapes(kind, tmp_path):
    path, whole = tmp_path / f"x.{kind}", 0
    for seed in range(150):
        rng, shapes = random.Random(seed), dict(SHAPES_ON_DISK)
        for name in rng.sample(sorted(shapes), rng.randint(1, 3)):
            shapes[name] = rng.choice(ODD)
        if rng.random() < 0.2:
            del shapes[rng.choice(sorted(shapes))]
        write(path, shapes)
        sizes, tensors = bounded(path, seed)
        assert tensors == len(shapes), f"seed {seed}"
        whole += sizes == len(LAYOUTS)
    assert whole < 100


def test_edited_headers(tmp_path):
    path = tmp_path / "x.safetensors"
    write(path, SHAPES_ON_DISK)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    for seed in range(400):
        rng, header = random.Random(seed), json.loads(content[8 : 8 + length])
        name = rng.choice(sorted(header))
        field = rng.choice(["row", "name", "dtype", "shape", "data_offsets", "one"])
        if field == "row":
            header[name] = rng.choice(JUNK)
        elif field == "name":
            header[rng.choice(["", "x\n\x1b[31m", "\ud800", "a" * 10**5])] = header.pop(name)
        elif field == "one" and "shape" in header[name]:
            numbers = header[name][rng.choice(["shape", "data_offsets"])]
            numbers[rng.randrange(len(numbers))] = rng.choice(JUNK)
        else:
            header[name][field] = rng.choice(JUNK + [list(shape) for shape in ODD])
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
        bounded(path, seed)
