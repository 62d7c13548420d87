"""Arrays, damaged files and the comparisons that the tests of checkpoint files share."""

from __future__ import annotations

import os
import struct
import zipfile

import numpy as np
import pytest

from ldm.checkpoints.file import CheckpointError, open_checkpoint


def sample_arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "z.weight": rng.standard_normal((3, 4, 5)).astype(np.float32),
        "half": rng.standard_normal(7).astype(np.float16),
        "a.position_ids": np.arange(77).reshape(1, 77),
        "step": np.array(3, np.int32),
        "scalar": np.array(2.5, np.float64),
        "one": np.array([2.5], np.float32),
        "mask": np.array([True, False, True]),
        "bytes": np.arange(5, dtype=np.uint8),
        "none": np.zeros((0, 3), np.float32),
        "": np.ones(2, np.float32),
        "gewicht.ü.重み": np.ones((1, 2), np.float32),
    }


def read_all(path) -> dict[str, np.ndarray]:
    with open_checkpoint(path) as file:
        return {name: file.read(name) for name in file.tensors}


def assert_same(got: dict, want: dict) -> None:
    assert list(got) == list(want)
    for name in want:
        assert (got[name].shape, got[name].dtype) == (np.shape(want[name]), want[name].dtype), name
        assert np.array_equal(got[name], want[name]), name


def fails(path, *words: str) -> str:
    """Opening gives one line that names the file and holds these words."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    assert all(word in message for word in words), message
    return message


def silent_truncations(path) -> list[bytes]:
    """Every shorter version of a file that opens without an error, longest first. Leaves the file empty."""
    content = path.read_bytes()
    silent = []
    for length in reversed(range(len(content))):
        os.truncate(path, length)  # much faster than to write the file again
        try:
            open_checkpoint(path).close()
            silent.append(content[:length])
        except CheckpointError as error:
            assert str(path) in str(error)
    return silent


def damage(path) -> None:
    """Change random bytes of a file and read it, many times: no error but `CheckpointError` may come."""
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(content)
        for at in rng.integers(0, len(content), rng.integers(1, 4)):
            damaged[at] = rng.integers(256)
        with open(path, "r+b") as file:
            file.write(damaged)
        try:
            read_all(path)
        except CheckpointError:
            pass


def pickled(value) -> bytes:
    """The opcodes of an int, a str or a tuple of them; bytes are opcodes already."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    return b"(" + b"".join(map(pickled, value)) + b"t"


def glob(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def torch_tensor(key: str, count: int, size, stride, offset: int = 0, kind: str = "FloatStorage") -> bytes:
    storage = pickled(("storage", glob("torch", kind), key, "cpu", count)) + b"Q"
    hooks = glob("collections", "OrderedDict") + b")R"
    args = (storage, offset, tuple(size), tuple(stride), b"\x89", hooks)
    return glob("torch._utils", "_rebuild_tensor_v2") + pickled(args) + b"R"


def torch_dict(items: dict) -> bytes:
    return b"}(" + b"".join(pickled(key) + pickled(value) for key, value in items.items()) + b"u"


def write_torch(path, opcodes: bytes, storages: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + opcodes + b".")
        archive.writestr("archive/byteorder", "little")
        for key, content in storages.items():
            archive.writestr(f"archive/data/{key}", content)


def write_trainer_file(path, arrays: dict[str, np.ndarray]) -> None:
    """Float32 arrays as the state_dict of a trainer's torch file, with what it keeps beside them."""
    tensors = {name: torch_tensor(str(i), array.size, array.shape,
                                  [stride // array.itemsize for stride in np.ascontiguousarray(array).strides])
               for i, (name, array) in enumerate(arrays.items())}
    callbacks = b"}" + glob("pytorch_lightning.callbacks", "ModelCheckpoint") + torch_dict({"best": 1}) + b"s"
    content = {"epoch": 3, "optimizer_states": b"](" + torch_dict({"exp_avg": next(iter(tensors.values()))}) + b"e",
               "callbacks": callbacks, "state_dict": torch_dict(tensors)}
    write_torch(path, torch_dict(content), {str(i): array.tobytes() for i, array in enumerate(arrays.values())})
