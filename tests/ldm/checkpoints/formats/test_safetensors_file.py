"""safetensors: the library and we read each other's files, and damage never gets past an error."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import safetensors.numpy

from ldm.checkpoints.file import save_arrays
from tests.support.checkpoints import assert_same, damage, fails, read_all, sample_arrays, silent_truncations


def test_safetensors_library_reads_ours(tmp_path):
    path = tmp_path / "x.safetensors"
    save_arrays(path, sample_arrays(), {"origin": "täst"})
    loaded = safetensors.numpy.load_file(path)
    assert_same({name: loaded[name] for name in sample_arrays()}, sample_arrays())
    with safetensors.safe_open(path, framework="np") as file:
        assert file.metadata() == {"format": "np", "origin": "täst"}
    assert struct.unpack("<Q", path.read_bytes()[:8])[0] % 8 == 0


def test_we_read_the_safetensors_library(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(sample_arrays(), path, {"origin": "test"})
    got = read_all(path)
    assert_same({name: got[name] for name in sample_arrays()}, sample_arrays())


def safetensors_bytes(header, payload: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


def row(begin: int, end: int, shape=(1,), dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "header, words",
    [
        ({"w": row(0, 4, dtype="F8_E8M0")}, ("'w'", "F8_E8M0", "float16")),
        ({"w": row(0, 8)}, ("'w'", "needs 4 bytes", "0 to 8")),
        ({"w": row(0, 4), "v": row(0, 4)}, ("overlap",)),
        ({"w": row(4, 8)}, ("gap",)),
        ({"w": row(0, 400, (100,))}, ("cut short", "392 missing")),
        ({"w": row(0, 4)}, ("4 bytes after its last tensor",)),
        ({"w": row(0, 8, (-2, -1))}, ("impossible shape",)),
        ({"w": {"dtype": "F32"}}, ("damaged",)),
        ({"w": 3}, ("damaged",)),
        (b"[1]", ("no sane header",)),
        (b"{" + b'"a":{' * 50_000, ("damaged",)),
        (b'{"w": 1, "w": 2}', ("'w' twice",)),
        ({}, ("no tensor",)),
    ],
    ids=range(13),
)
def test_safetensors_that_cannot_be_right(tmp_path, header, words):
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_bytes(header, b"" if header == {} else bytes(8)))
    if header == b"[1]":
        path.write_bytes(b"\xff" * 8 + path.read_bytes())
    fails(path, *words)


def test_every_truncation_is_an_error(tmp_path):
    save_arrays(tmp_path / "x.safetensors", {"a": np.ones((3, 5), np.float32), "b": np.array(1)})
    assert not silent_truncations(tmp_path / "x.safetensors")


def test_random_damage_gives_no_other_error(tmp_path):
    save_arrays(tmp_path / "x.safetensors", {"a": np.ones((3, 5), np.float32), "b": np.array(1)})
    damage(tmp_path / "x.safetensors")
