"""MindSpore .ckpt: MindSpore and we read each other's files, and damage never gets past an error."""

from __future__ import annotations

import os

import numpy as np
import pytest

from ldm.checkpoints.file import CheckpointError, TensorInfo, open_checkpoint, save_arrays
from ldm.checkpoints.formats import mindspore_ckpt
from tests.support.checkpoints import assert_same, damage, fails, read_all, sample_arrays, silent_truncations


def test_a_tensor_in_many_slices(tmp_path, monkeypatch):
    monkeypatch.setattr(mindspore_ckpt, "SLICE_BYTES", 24)
    save_arrays(tmp_path / "x.ckpt", sample_arrays())
    assert_same(read_all(tmp_path / "x.ckpt"), sample_arrays())


def as_mindspore(arrays: dict) -> dict:
    """MindSpore drops tensors without elements, and a parameter needs a name."""
    return {name: array for name, array in arrays.items() if name and array.size}


@pytest.mark.parametrize("slice_bytes", (1 << 29, 40))
def test_mindspore_reads_ours(tmp_path, monkeypatch, slice_bytes):
    ms = pytest.importorskip("mindspore")
    monkeypatch.setattr(mindspore_ckpt, "SLICE_BYTES", slice_bytes)
    arrays = as_mindspore(sample_arrays())
    save_arrays(tmp_path / "x.ckpt", arrays)
    loaded = ms.load_checkpoint(str(tmp_path / "x.ckpt"))
    assert_same({name: value.asnumpy() for name, value in loaded.items()}, arrays)


@pytest.mark.parametrize("slice_kilobytes", (512 * 1024, 1))
@pytest.mark.parametrize("crc_check", (False, True))
def test_we_read_mindspores(tmp_path, monkeypatch, slice_kilobytes, crc_check):
    ms = pytest.importorskip("mindspore")
    from mindspore.train import serialization

    monkeypatch.setattr(serialization, "SLICE_SIZE", slice_kilobytes)
    path = tmp_path / "x.ckpt"
    arrays = {**as_mindspore(sample_arrays()), "big": np.arange(700, dtype=np.float32).reshape(7, 100)}
    params = [{"name": name, "data": ms.Tensor(array)} for name, array in arrays.items()]
    ms.save_checkpoint(params, str(path), crc_check=crc_check)
    assert_same(read_all(path), arrays)
    records = path.read_bytes().count(b"\x03big")
    assert records == (1 if slice_kilobytes > 1 else 3)


def test_mindspores_bfloat16_strings_and_encryption(tmp_path):
    ms = pytest.importorskip("mindspore")
    path = tmp_path / "x.ckpt"
    params = [{"name": "b", "data": ms.Tensor([1.5, -2.0], ms.bfloat16)}]
    ms.save_checkpoint(params, str(path))
    with open_checkpoint(path) as file:
        assert file.tensors["b"] == TensorInfo((2,), "bfloat16")
        assert file.read("b").tolist() == [1.5, -2.0]
    ms.save_checkpoint(params, str(path), append_dict={"author": "me"})
    fails(path, "'author' is a string")
    for mode in ("AES-GCM", "AES-CBC"):
        ms.save_checkpoint(params, str(path), enc_key=b"0123456789ABCDEF", enc_mode=mode)
        fails(path, "encrypted")


def test_field_numbers_are_mindspores():
    pb2 = pytest.importorskip("mindspore.train.checkpoint_pb2")
    numbers = {
        (message.name, field.name): field.number
        for message in (pb2.Checkpoint.DESCRIPTOR, pb2.Checkpoint.Value.DESCRIPTOR, pb2.TensorProto.DESCRIPTOR)
        for field in message.fields
    }
    assert numbers == {
        ("Checkpoint", "value"): 1,
        ("Value", "tag"): 1,
        ("Value", "tensor"): 2,
        ("Value", "maptensor"): 3,
        ("TensorProto", "dims"): 1,
        ("TensorProto", "tensor_type"): 2,
        ("TensorProto", "tensor_content"): 3,
    }


def field(number: int, content) -> bytes:
    """One protobuf field: bytes, or an int as a varint."""
    if isinstance(content, int):
        return mindspore_ckpt.varint(number << 3) + mindspore_ckpt.varint(content)
    return mindspore_ckpt.varint(number << 3 | 2) + mindspore_ckpt.varint(len(content)) + content


def record(name: bytes, content: bytes, dims=b"", kind: bytes = b"Float32") -> bytes:
    return field(1, field(1, name) + field(2, dims + field(2, kind) + field(3, content)))


def test_wire_format_variants(tmp_path):
    path = tmp_path / "x.ckpt"
    ones = np.ones(6, np.float32).tobytes()
    path.write_bytes(
        field(9, b"unknown") + field(10, 5)
        + field(1, field(1, b"no tensor"))
        + field(1, field(2, field(3, ones) + field(2, b"Float32") + field(7, 1) + field(1, 6)) + field(1, b"order"))
        + record(b"old scalar", ones[:4], field(1, 0))
        + record(b"empty", b"", field(1, 0))
    )  # fmt: skip
    shapes = {name: array.shape for name, array in read_all(path).items()}
    assert shapes == {"order": (6,), "old scalar": (), "empty": (0,)}


@pytest.mark.parametrize(
    "content, words",
    [
        (record(b"w", b"12345678"), ("'w'", "has 8 bytes", "expected 4")),
        (record(b"w", b"1234") * 2, ("'w' twice",)),
        (record(b"w", b"1234") + record(b"v", b"1234") + record(b"w", b"1234"), ("'w' twice",)),
        (record(b"w", b"12345678", field(1, 4)) + record(b"v", b"1234"), ("'w' has 8 of its 16 bytes",)),
        (record(b"w", b"1234", field(1, 2)) + record(b"w", b"1234", field(1, 1)), ("'w' changes",)),
        (record(b"w", b"1234", kind=b"Int4"), ("'Int4'", "float32")),
        (record(b"w", b"1234", field(1, 2**64 - 1)), ("impossible shape",)),
        (record(b"\xff", b"1234"), ("UTF-8",)),
        (field(1, field(1, b"w") + field(3, b"")), ("'w' is a MapParameter",)),
        (field(1, field(1, b"w") + field(2, field(2, b"Float32"))), ("without",)),
        (field(9, b"unknown"), ("no tensor",)),
    ],
    ids=range(11),
)
def test_ckpt_that_cannot_be_right(tmp_path, content, words):
    path = tmp_path / "x.ckpt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_all(path)
    assert str(path) in str(caught.value) and all(word in str(caught.value) for word in words), str(caught.value)


def test_a_truncation_is_an_error_except_between_tensors(tmp_path):
    """The format has no end mark, so there the file is valid."""
    arrays = {"a": np.ones((3, 5), np.float32), "b": np.ones(70, np.float16), "c": np.array(1)}
    save_arrays(tmp_path / "x.ckpt", arrays)
    found = []
    for content in silent_truncations(tmp_path / "x.ckpt"):
        (tmp_path / "cut.ckpt").write_bytes(content)
        found.append(list(read_all(tmp_path / "cut.ckpt")))
    assert found == [["a", "b"], ["a"]]


def test_random_damage_gives_no_other_error(tmp_path):
    save_arrays(tmp_path / "x.ckpt", {"a": np.ones((3, 5), np.float32), "b": np.array(1)})
    damage(tmp_path / "x.ckpt")


def test_opening_a_huge_file(tmp_path):
    """Beyond the 2 GiB of one protobuf message; sparse, so it takes neither time nor space."""
    path, size = tmp_path / "x.ckpt", 600 << 20
    with open(path, "wb") as file:
        for index in range(4):
            file.write(mindspore_ckpt.record_head(f"t{index}", TensorInfo((size // 4,), "float32"), size))
            file.seek(size, os.SEEK_CUR)
        file.truncate()
    with open_checkpoint(path) as file:
        assert list(file.tensors) == ["t0", "t1", "t2", "t3"]
