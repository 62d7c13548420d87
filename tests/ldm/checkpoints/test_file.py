"""Checkpoint files: what goes in comes out, one tensor at a time, and a failure leaves the old file."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from mindspore import nn

from ldm import files
from ldm.checkpoints import file as checkpoint_file
from ldm.checkpoints.file import CheckpointError, TensorInfo, open_checkpoint, save_arrays, write_checkpoint
from ldm.checkpoints.loading import leave_memory
from tests.support.arrays import DATA
from tests.support.checkpoints import assert_same, fails, read_all, sample_arrays

ENDINGS = (".safetensors", ".ckpt")


@pytest.mark.parametrize("ending", ENDINGS)
def test_round_trip(tmp_path, ending):
    path = tmp_path / "new" / "folder" / ("x" + ending)
    arrays = sample_arrays()
    digest = save_arrays(path, arrays)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert os.listdir(path.parent) == [path.name]
    with open_checkpoint(str(path)) as file:
        assert file.path == path
        assert file.tensors == {name: TensorInfo(a.shape, a.dtype.name) for name, a in arrays.items()}
    got = read_all(path)
    assert_same(got, arrays)
    for array in got.values():
        assert array.flags.c_contiguous and array.flags.aligned and array.flags.writeable


@pytest.mark.parametrize("ending", ENDINGS)
def test_content_decides_not_the_ending(tmp_path, ending):
    save_arrays(tmp_path / ("x" + ending), sample_arrays())
    for wrong in (".bin", ".ckpt", ".safetensors", ""):
        other = tmp_path / ("y" + wrong)
        shutil.copy(tmp_path / ("x" + ending), other)
        assert_same(read_all(other), sample_arrays())


@pytest.mark.parametrize("ending", ENDINGS)
def test_write_casts_to_the_info(tmp_path, ending):
    path = tmp_path / ("x" + ending)
    source = np.linspace(-3, 3, 12, dtype=np.float32).reshape(4, 3)
    infos = {"h": TensorInfo((3, 4), "float16"), "b": TensorInfo((3, 4), "bfloat16")}
    write_checkpoint(path, infos, lambda name: source.T)  # a transposed view is not contiguous
    with open_checkpoint(path) as file:
        assert file.tensors == infos
        assert np.array_equal(file.read("h"), source.T.astype(np.float16))
        assert file.read("b").dtype == np.float32
        assert np.allclose(file.read("b"), source.T, rtol=2**-8, atol=0)


def test_a_scalar_of_bfloat16(tmp_path):
    write_checkpoint(tmp_path / "x.ckpt", {"logit_scale": TensorInfo((), "bfloat16")}, lambda name: np.float32(1.5))
    with open_checkpoint(tmp_path / "x.ckpt") as file:
        value = file.read("logit_scale")
    assert value.shape == () and value.dtype == np.float32 and value == 1.5


def test_bfloat16_rounds_to_nearest_even_and_keeps_specials(tmp_path):
    ulp = 2.0**-7  # of bfloat16 at 1
    given = np.array([1 + ulp / 2, 1 + 1.5 * ulp, 1 + 0.6 * ulp, -0.0, np.inf, -np.inf, np.nan], np.float32)
    want = np.array([1, 1 + 2 * ulp, 1 + ulp, -0.0, np.inf, -np.inf, np.nan], np.float32)
    write_checkpoint(tmp_path / "x.ckpt", {"b": TensorInfo(given.shape, "bfloat16")}, lambda name: given)
    assert np.array_equal(read_all(tmp_path / "x.ckpt")["b"], want, equal_nan=True)


def test_messages_for_what_is_no_checkpoint(tmp_path):
    fails(tmp_path / "absent.ckpt", "does not exist", "its folder exists")
    fails(tmp_path / "no" / "absent.ckpt", "nor does the folder")
    fails(tmp_path, "is a folder")
    fails("", "the path '' is empty", "name a checkpoint file")
    with pytest.raises(CheckpointError, match="the path 'a[?]b' is empty or holds a NUL"):
        open_checkpoint("a\0b")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        fails(path, "is not a regular file, expected one checkpoint file")
    path = tmp_path / "x.bin"
    for content, word in (
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\x80\x02}q\x00.", "old torch"),
        (b"hello", "not a checkpoint"),
    ):
        path.write_bytes(content)
        fails(path, word)


def test_messages_hold_no_control_characters(tmp_path):
    """Whether a file or a tensor is named so, and who raises them."""
    path = tmp_path / "a\x1b[31m\nb.safetensors"
    with pytest.raises(CheckpointError, match=r"a\?\[31m\?b.safetensors does not exist"):
        open_checkpoint(path)
    save_arrays(path, {"w": np.ones(2, np.float32)})
    with open_checkpoint(path) as file:
        with pytest.raises(CheckpointError, match=r"a\?\[31m\?b.safetensors has no tensor 'x\?y'"):
            file.read("x\ny")
    with pytest.raises(CheckpointError, match=r"b.safetensors: 'x\?y' has dtype 'complex64'"):
        save_arrays(path, {"x\ny": np.ones(2, np.complex64)})


@pytest.mark.parametrize("count", [100_000, 1_000_000])  # copied, mapped
def test_read_of_a_file_that_shrank(tmp_path, count):
    path = tmp_path / "x.ckpt"
    save_arrays(path, {"w": np.ones(count, np.float32)})
    with open_checkpoint(path) as file:
        os.truncate(path, 100_000)
        with pytest.raises(CheckpointError, match="'w'"):
            file.read("w")
        with pytest.raises(CheckpointError, match="no tensor 'v'"):
            file.read("v")


class Boom(Exception):
    pass


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("error", (Boom, KeyboardInterrupt))
def test_failing_read_leaves_the_old_file(tmp_path, ending, error):
    path = tmp_path / ("x" + ending)
    save_arrays(path, sample_arrays())

    def read(name):
        if name == "b":
            raise error
        return np.zeros(3, np.float32)

    with pytest.raises(error):
        write_checkpoint(path, {name: TensorInfo((3,), "float32") for name in "abc"}, read)
    assert os.listdir(tmp_path) == [path.name]
    assert_same(read_all(path), sample_arrays())


def test_a_checkpoint_can_replace_the_one_it_is_read_from(tmp_path):
    path = tmp_path / "x.ckpt"
    save_arrays(path, sample_arrays())
    with open_checkpoint(path) as file:
        write_checkpoint(path, dict(reversed(list(file.tensors.items()))), file.read)
    assert_same(read_all(path), dict(reversed(list(sample_arrays().items()))))


def test_no_space_is_seen_before_writing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="x.ckpt needs 400 bytes, 100 are free"):
        save_arrays(tmp_path / "x.ckpt", {"w": np.ones(100, np.float32)})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("call", ("fsync", "replace", "mkdir"))
def test_disk_errors_name_path_and_bytes(tmp_path, monkeypatch, call):
    path = tmp_path / "x.ckpt"
    save_arrays(path, sample_arrays())

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*(("pathlib.Path.mkdir", full) if call == "mkdir" else (os, call, full)))
    wanted = tmp_path / "new" / "x.ckpt" if call == "mkdir" else path
    with pytest.raises(CheckpointError, match="x.ckpt cannot be written: No space left.* needs 400 bytes, .* are free"):
        save_arrays(wanted, {"w": np.ones(100, np.float32)})
    monkeypatch.undo()
    assert os.listdir(tmp_path) == [path.name]
    assert_same(read_all(path), sample_arrays())


def test_disk_full_while_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "open", lambda path, mode: open("/dev/full", mode), raising=False)
    with pytest.raises(CheckpointError, match="No space left"):
        save_arrays(tmp_path / "x.safetensors", {"w": np.ones(100, np.float32)})
    assert os.listdir(tmp_path) == []


def test_wrong_arguments_of_write(tmp_path):
    one = {"w": TensorInfo((2,), "float16")}
    for path, infos, value, words in (
        ("x.bin", one, np.ones(2), "expected .safetensors or .ckpt"),
        ("x.ckpt", {}, np.ones(2), "no tensor to write"),
        ("x.ckpt", one, np.ones(3), r"'w' came with shape \(3,\), expected \(2,\)"),
        ("x.ckpt", one, np.array([1, 1e6], np.float32), "'w' has values beyond the range of float16"),
        ("x.ckpt", {"w": TensorInfo((2,), "complex64")}, np.ones(2), "'complex64'"),
    ):
        with pytest.raises(CheckpointError, match=words):
            write_checkpoint(tmp_path / path, infos, lambda name, value=value: value)
    assert os.listdir(tmp_path) == []


def peak_bytes(function) -> int:
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("mapped, tensors_held", [(1 << 20, 0), (1 << 30, 1)])
@pytest.mark.parametrize("ending", ENDINGS)
def test_reading_and_writing_hold_one_tensor(tmp_path, monkeypatch, ending, mapped, tensors_held):
    """NumPy reports what it allocates to tracemalloc, and file buffers come from Python's own allocator; what is mapped
    belongs to the file."""
    monkeypatch.setattr(checkpoint_file, "MAPPED_BYTES", mapped)
    path, count = tmp_path / ("x" + ending), 1 << 20
    infos = {f"t{i}": TensorInfo((count,), "float32") for i in range(6)}

    def read_each():
        with open_checkpoint(path) as file:
            for name in file.tensors:
                file.read(name)

    def write():
        write_checkpoint(path, infos, lambda name: np.zeros(count, np.float32))

    assert peak_bytes(write) < 1.2 * 4 * count
    assert peak_bytes(lambda: open_checkpoint(path).close()) < 1 << 20
    assert tensors_held * 4 * count <= peak_bytes(read_each) < (tensors_held + 0.2) * 4 * count


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux says what a process holds")
def test_mapped_tensors_leave_memory_and_can_still_be_read(tmp_path):
    def resident():
        return int(re.search(r"RssFile:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10

    path, bytes_ = tmp_path / "x.safetensors", 64 << 20
    save_arrays(path, {"large": np.ones(bytes_ // 4, np.float32), "small": np.ones(3, np.float32)})
    with open_checkpoint(path) as file:
        large, small = file.read("large"), file.read("small")
    assert checkpoint_file.mapping(small) is None
    before = resident()
    assert large.sum() == bytes_ // 4 and resident() - before > 0.9 * bytes_
    network = nn.Cell()
    network.mappings = [checkpoint_file.mapping(large.reshape(2, -1)[1])]
    leave_memory(network)
    assert resident() - before < 0.1 * bytes_
    assert large.sum() == bytes_ // 4


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("name", ["w", "ww", "www", "wwww"])  # that shift what follows it
def test_a_large_tensor_is_aligned_and_can_be_written_to_without_changing_the_file(tmp_path, ending, name):
    path, array = tmp_path / ("x" + ending), np.arange(1 << 18, dtype=np.float32)
    save_arrays(path, {"half": np.ones(2, np.float16), name: array})
    before = path.read_bytes()
    with open_checkpoint(path) as file:
        read = file.read(name)
    assert checkpoint_file.mapping(read) is not None and read.flags.aligned and read.flags.writeable
    np.testing.assert_array_equal(read, array)  # also when the file is closed
    read += 1
    assert path.read_bytes() == before


def test_eight_bit_floats_of_torch_are_read():
    """tests/record/record_float8.py: `half` is what torch made of `e5m2`, which it has saved transposed."""
    with open_checkpoint(DATA / "float8.pt") as file:
        half, wide, narrow = (file.read(name) for name in ("half", "e5m2", "e4m3fn"))
    np.testing.assert_array_equal(wide.T.reshape(-1), half.astype(np.float32))
    assert wide.dtype == narrow.dtype == np.float32 and wide.shape == (16, 16)
    assert narrow[0x7E] == 448 and narrow[0x38] == 1 and narrow[0xB8] == -1 and np.isnan(narrow[0x7F])
