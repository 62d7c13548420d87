"""torch archives, put together by hand from pickle opcodes (protocol 2, as torch writes them)."""

from __future__ import annotations

import struct
import zipfile

import numpy as np
import pytest

from tests.ldm.checkpoint_samples import assert_same, damage, fails, read_all, silent_truncations


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


def test_torch_archive(tmp_path):
    path = tmp_path / "adapter.bin"
    floats, halves = np.arange(24, dtype=np.float32), np.arange(4, dtype=np.float16)
    brain = (np.array([1.5, -2], np.float32).view(np.uint32) >> 16).astype(np.uint16)
    parameter = torch_tensor("0", 24, (24,), (1,))
    projection = {
        "plain": torch_tensor("0", 24, (2, 3, 4), (12, 4, 1)),
        "transposed": torch_tensor("0", 24, (4, 3), (1, 4), 12),
        "every second": torch_tensor("0", 24, (2, 3), (6, 2), 1),
        "expanded": torch_tensor("0", 24, (3, 2), (0, 1), 5),
        "scalar": torch_tensor("0", 24, (), (), 7),
        "empty": torch_tensor("0", 24, (0, 3), (3, 1), 24),
        "parameter": glob("torch._utils", "_rebuild_parameter") + pickled((parameter, b"\x88", b"N")) + b"R",
    }
    adapter = {
        "1.to_k_ip.weight": torch_tensor("1", 4, (2, 2), (2, 1), kind="HalfStorage"),
        "brain": torch_tensor("2", 2, (2,), (1,), kind="BFloat16Storage"),
        "ids": torch_tensor("3", 3, (1, 3), (3, 1), kind="LongStorage"),
    }
    content = {"image_proj": torch_dict(projection), "ip_adapter": torch_dict(adapter), "step": 3, "note": "hi"}
    storages = {"0": floats, "1": halves, "2": brain, "3": np.arange(3)}
    write_torch(path, torch_dict(content), {key: array.tobytes() for key, array in storages.items()})
    want = {
        "plain": floats.reshape(2, 3, 4),
        "transposed": floats[12:].reshape(3, 4).T,
        "every second": floats[1:13].reshape(2, 6)[:, :5:2],
        "expanded": np.tile(floats[5:7], (3, 1)),
        "scalar": floats[7].reshape(()),
        "empty": np.zeros((0, 3), np.float32),
        "parameter": floats,
    }
    want = {f"image_proj.{name}": array for name, array in want.items()}
    want["ip_adapter.1.to_k_ip.weight"] = halves.reshape(2, 2)
    want["ip_adapter.brain"] = np.array([1.5, -2], np.float32)
    want["ip_adapter.ids"] = np.arange(3)[None]
    got = read_all(path)
    assert_same(got, want)
    assert all(array.flags.c_contiguous and array.flags.writeable for array in got.values())


def test_strides_that_do_not_count(tmp_path):
    """Where a length is 0 or 1 torch may leave any stride, and numpy must not stumble over a big one."""
    shapes = {"one": (1, 2), "none": (0, 2)}
    views = {name: torch_tensor("0", 2, shape, (2**31 - 1, 1)) for name, shape in shapes.items()}
    write_torch(tmp_path / "x.bin", torch_dict(views), {"0": np.ones(2, np.float32).tobytes()})
    assert_same(read_all(tmp_path / "x.bin"), {name: np.ones(shape, np.float32) for name, shape in shapes.items()})


def torch_untyped(key: str, nbytes: int, size, stride, dtype: str, offset: int = 0, kind: bytes = b"") -> bytes:
    kind = kind or glob("torch.storage", "UntypedStorage")
    storage = pickled(("storage", kind, key, "cpu", nbytes)) + b"Q"
    hooks = glob("collections", "OrderedDict") + b")R"
    args = (storage, offset, tuple(size), tuple(stride), b"\x89", hooks, glob("torch", dtype))
    return glob("torch._utils", "_rebuild_tensor_v3") + pickled(args) + b"R"


def test_dtypes_without_a_storage_class(tmp_path):
    path, values = tmp_path / "unsigned.pt", np.array([1, 2, 65535, 4, 5, 6], np.uint16)
    write_torch(path, torch_dict({
        "plain": torch_untyped("0", 12, (6,), (1,), "uint16"),
        "transposed": torch_untyped("0", 12, (2, 2), (1, 2), "uint16", 1),
        "wide": torch_untyped("0", 12, (3,), (1,), "uint32"),
    }), {"0": values.tobytes()})
    assert_same(read_all(path), {"plain": values, "transposed": values[1:5].reshape(2, 2).T,
                                 "wide": values.view(np.uint32)})


@pytest.mark.parametrize("tensor", [
    torch_untyped("0", 12, (7,), (1,), "uint16"), torch_untyped("0", 12, (2,), (1,), "uint64"),
    torch_untyped("0", 16, (6,), (1,), "uint16"), torch_untyped("0", 12, (1,), (1,), "FloatStorage"),
    torch_untyped("0", 3, (1,), (1,), "uint16", kind=glob("torch", "FloatStorage"))])
def test_views_beyond_their_bytes(tmp_path, tensor):
    write_torch(tmp_path / "x.pt", torch_dict({"w": tensor}), {"0": bytes(12)})
    fails(tmp_path / "x.pt", "damaged")


def test_a_few_bytes_do_not_ask_for_all_memory(tmp_path):
    repeated = torch_tensor("0", 1, (1 << 16, 1 << 16), (0, 0))
    write_torch(tmp_path / "x.pt", torch_dict({"w": repeated}), {"0": bytes(4)})
    fails(tmp_path / "x.pt", "(65536, 65536)")


def test_state_dict_with_attributes(tmp_path):
    """A module's state_dict is an OrderedDict with an attribute, which the pickle sets."""
    ordered = glob("collections", "OrderedDict") + b")R"
    items = torch_dict({"w": torch_tensor("0", 2, (2,), (1,))})[1:]
    write_torch(tmp_path / "x.pth", ordered + items + torch_dict({"_metadata": ordered}) + b"b", {"0": bytes(8)})
    assert list(read_all(tmp_path / "x.pth")) == ["w"]


@pytest.mark.parametrize(
    "module, name", [("os", "system"), ("builtins", "eval"), ("torch", "load"), ("torch._utils", "_rebuild_qtensor")]
)
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, module, name):
    canary = tmp_path / "canary"
    call = glob(module, name) + pickled((f"touch {canary}",)) + b"R"
    tensor = torch_tensor("0", 2, (2,), (1,))
    write_torch(tmp_path / "x.bin", torch_dict({"w": tensor, "evil": call}), {"0": bytes(8)})
    fails(tmp_path / "x.bin", f"{module}.{name}", "refused", "nothing was run", ".safetensors")
    assert not canary.exists()


@pytest.mark.parametrize(
    "opcodes",
    [
        torch_dict({"w": torch_tensor("0", 2, (3,), (1,))}),  # beyond its storage
        torch_dict({"w": torch_tensor("0", 2, (1,), (1,), offset=-1)}),
        torch_dict({"w": torch_tensor("0", 2, (2, 2), (-1, 1))}),
        torch_dict({"w": torch_tensor("0", 3, (3,), (1,))}),  # a storage beyond its member
        torch_dict({"w": torch_tensor("9", 2, (2,), (1,))}),
        torch_dict({"w": glob("torch", "FloatStorage") + b")R"}),
        b"}(" + (pickled("w") + torch_tensor("0", 2, (2,), (1,))) + b"}",
        b"}r\xff\xff\xff\x7f",  # room for two thousand million memo entries
        b"}q\x00(" + pickled("a") + b"h\x00u",  # contains itself
        b"}q\x00(" + b"".join(pickled("x" * n) + b"h\x00" for n in range(5)) + b"u",
        b"]" * 100_000 + b"a" * 99_999,
        b"\x8d" + b"\xff" * 8,  # a string of 2**64 bytes
        torch_tensor("0", 2, (2,), (1,)),  # a bare tensor
        torch_dict({"w": 1}),
        torch_dict({"a.b": torch_tensor("0", 1, (), ()), "a": torch_dict({"b": torch_tensor("0", 1, (), ())})}),
        torch_dict({"w": torch_tensor("0", 2, (2,), (1,)) + torch_dict({"entry": 1}) + b"b"}),  # alters a stand-in
        # a storage that the pickle made up
        glob("torch._utils", "_rebuild_tensor_v2") + pickled((("float32", 0, 2), 0, (2,), (1,))) + b"R",
    ],
    ids=range(17),
)
def test_broken_pickles(tmp_path, opcodes):
    write_torch(tmp_path / "x.bin", opcodes, {"0": bytes(8)})
    fails(tmp_path / "x.bin")


def test_zips_that_are_no_torch_archive(tmp_path):
    path = tmp_path / "x.bin"
    write_torch(path, torch_dict({"w": torch_tensor("0", 2, (2,), (1,))}), {"0": bytes(8)}, zipfile.ZIP_DEFLATED)
    fails(path, "compressed")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hi")
    fails(path, "without a torch pickle")


def test_every_truncation_is_an_error(tmp_path):
    write_torch(tmp_path / "x.bin", torch_dict({"a": torch_tensor("0", 15, (3, 5), (5, 1))}), {"0": bytes(60)})
    assert not silent_truncations(tmp_path / "x.bin")


def test_random_damage_gives_no_other_error(tmp_path):
    write_torch(tmp_path / "x.bin", torch_dict({"a": torch_tensor("0", 15, (3, 5), (1, 3))}), {"0": bytes(60)})
    damage(tmp_path / "x.bin")
