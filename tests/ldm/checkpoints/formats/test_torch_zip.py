"""torch archives, put together by hand from pickle opcodes (protocol 2, as torch writes them)."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest

from tests.support.checkpoints import (
    assert_same,
    damage,
    fails,
    glob,
    pickled,
    read_all,
    silent_truncations,
    torch_dict,
    torch_tensor,
    write_torch,
)


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


def test_a_trainer_keeps_its_weights_under_state_dict(tmp_path):
    """What stands beside them is left out, and may mention classes as long as none is used."""
    callback = glob("pytorch_lightning.callbacks", "ModelCheckpoint")
    weights = torch_dict({"w": torch_tensor("0", 2, (2,), (1,)), "dtype": glob("torch", "float32")})
    content = {
        "epoch": 3,
        "optimizer_states": b"](" + torch_dict({"exp_avg": torch_tensor("1", 2, (2,), (1,))}) + b"e",
        "callbacks": b"}" + callback + torch_dict({"best": torch_tensor("1", 2, (2,), (1,))}) + b"s",
        "state_dict": weights,
    }
    storages = {"0": np.array([1, 2], np.float32).tobytes(), "1": bytes(8)}
    write_torch(tmp_path / "x.ckpt", torch_dict(content), storages)
    assert_same(read_all(tmp_path / "x.ckpt"), {"w": np.array([1, 2], np.float32)})
    write_torch(tmp_path / "x.ckpt", torch_dict({"state_dict": 1, "w": content["callbacks"]}), storages)
    assert list(read_all(tmp_path / "x.ckpt")) == ["w.pytorch_lightning.callbacks.ModelCheckpoint.best"]


@pytest.mark.parametrize("use", [
    b")R",  # a call without arguments
    pickled(("touch canary",)) + b"R",
    b")\x81",  # an object without a call
    b")}\x92",  # the same with keywords
    torch_dict({"reference": 1}) + b"b",  # an attribute
    pickled((b"N", torch_dict({"reference": 1}))) + b"b",
])
@pytest.mark.parametrize("module, name", [("os", "system"), ("builtins", "dict"), ("builtins", "type")])
def test_what_is_mentioned_can_neither_be_called_nor_built_nor_altered(tmp_path, use, module, name):
    tensor = torch_tensor("0", 2, (2,), (1,))
    content = {"state_dict": torch_dict({"w": tensor}), "evil": glob(module, name) + use}
    write_torch(tmp_path / "x.bin", torch_dict(content), {"0": bytes(8)})
    fails(tmp_path / "x.bin", f"carries code: its pickle asks for {module}.{name}", "refused", "nothing was run")


@pytest.mark.parametrize("opcodes", [b"(" + b"ios\nsystem\n", b"(" + glob("os", "system") + b"o",
                                     b"(" + glob("os", "system") + pickled("touch canary") + b"o"])
def test_old_ways_to_make_an_object_are_refused_too(tmp_path, opcodes):
    write_torch(tmp_path / "x.bin", torch_dict({"evil": opcodes}), {"0": bytes(8)})
    fails(tmp_path / "x.bin", "carries code: its pickle asks for os.system", "nothing was run")


@pytest.mark.parametrize("use", [b"(" + pickled("a") + b"e", pickled("a") + b"a", pickled("a") + pickled("b") + b"s"])
def test_what_is_mentioned_holds_nothing(tmp_path, use):
    write_torch(tmp_path / "x.bin", torch_dict({"evil": glob("os", "environ") + use}), {"0": bytes(8)})
    fails(tmp_path / "x.bin", "damaged")


def test_mentions_are_counted(tmp_path):
    many = b"](" + b"".join(glob("a", f"b{n}") for n in range(2000)) + b"e"
    write_torch(tmp_path / "x.bin", torch_dict({"w": many}), {"0": bytes(8)})
    fails(tmp_path / "x.bin", "more than 1000 things besides tensors, such as a.b1000")


def test_a_storage_of_another_kind_is_named(tmp_path):
    tensor = torch_tensor("0", 1, (1,), (1,), kind="ComplexFloatStorage")
    write_torch(tmp_path / "x.bin", torch_dict({"w": tensor}), {"0": bytes(8)})
    fails(tmp_path / "x.bin", "holds a torch.ComplexFloatStorage, expected tensors of float64, float32")


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
