"""torch .bin / .pt / .pth: a zip archive of one pickle, whose tensors point to uncompressed members.

A pickle is a program. Here it can reach nothing but the few stand-ins below, whatever it asks for. It may mention other
things as plain data, as trainers do beside the weights, but neither call, build nor alter them.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from typing import NamedTuple

from ldm.checkpoints.formats.index import DTYPES, MAX_INDEX_BYTES, CheckpointError, Entry, checked_info, damaged

MAX_MENTIONS = 1000  # each takes memory; a trainer mentions a dozen
_DTYPE_OF = {row.torch: dtype for dtype, row in DTYPES.items() if row.torch}
_UNTYPED = "UntypedStorage"  # of bytes; its length is in bytes too
MAX_REPEATED = 1 << 20  # elements of a tensor that has more of them than its storage


def index_torch(file, size: int) -> dict[str, Entry]:
    """Where each tensor of a torch zip archive lies, nested dicts flattened with dots; see `ldm.checkpoints.formats`.

    Of a trainer's file only the `state_dict` counts: optimizer and bookkeeping beside it are left out.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            data, members = _members(file, size, archive)
        for opcode, argument, _ in pickletools.genops(data):
            # The unpickler reserves memory for as many entries as a PUT names.
            if "PUT" in opcode.name and int(argument) > len(data):
                raise ValueError(f"memo entry {argument}")
        content = _TensorUnpickler(io.BytesIO(data), members).load()
        entries: dict[str, Entry] = {}
        # Not content.get: the pickle can give an OrderedDict another attribute of that name.
        if isinstance(content, dict) and isinstance(dict.get(content, "state_dict"), dict):
            content = dict.get(content, "state_dict")
        if isinstance(content, dict):
            _flatten("", content, entries, set())
        return entries
    except CheckpointError:
        raise
    except Exception as error:  # a damaged archive or pickle can make their readers raise anything
        reason = f"{type(error).__name__}: {str(error):.80}"
        raise damaged(f"is a zip archive, but damaged, cut short or not of torch ({reason})") from error


def _members(file, size: int, archive: zipfile.ZipFile) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The pickle of a torch archive, and start and length of each storage by its key."""
    infos = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in infos if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise CheckpointError("is a zip archive without a torch pickle (data.pkl); expected a torch .bin or .pt file")
    if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 for info in infos.values()):
        raise CheckpointError("is a compressed or encrypted zip archive, not one that torch wrote; unpack it first")
    if infos[pickles[0]].file_size > MAX_INDEX_BYTES:
        raise CheckpointError(f"has a pickle of {infos[pickles[0]].file_size} bytes, more than an index can need")
    folder = pickles[0][: -len("data.pkl")]
    if folder + "byteorder" in infos and archive.read(folder + "byteorder") != b"little":
        raise CheckpointError("was written on a big-endian machine; save it again as .safetensors")
    members = {}
    for name, info in infos.items():
        if name.startswith(folder + "data/"):
            start = _member_start(file, info)
            if start + info.file_size > size:
                raise ValueError(f"{name} ends at byte {start + info.file_size} of {size}")
            members[name[len(folder + "data/") :]] = (start, info.file_size)
    return archive.read(pickles[0]), members


def _member_start(file, info: zipfile.ZipInfo) -> int:
    """First content byte of a member: its local header can be longer than the one in the directory."""
    file.seek(info.header_offset)
    header = file.read(30)
    if header[:4] != b"PK\x03\x04":
        raise ValueError(f"no local header for {info.filename}")
    return info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))


class _Storage(NamedTuple):
    dtype: str
    start: int  # byte in the file
    length: int  # elements


# The pickle can call and alter whatever `find_class` returns. So these have no state and no attributes to set.
class _RebuildTensor:
    __slots__ = ()

    def __call__(self, storage, offset, shape, strides, *_) -> Entry:
        """Stand-in of torch._utils._rebuild_tensor_v2: a view of a storage, in elements."""
        if not isinstance(storage, _Storage):
            raise ValueError("a tensor without storage")
        info = checked_info("a tensor", list(shape), storage.dtype, storage.dtype)
        # Where a length is 0 or 1, nothing else bounds the stride, and numpy fails on very big ones.
        if len(strides) != len(shape) or not all(type(n) is int and 0 <= n < 2**48 for n in (offset, *strides)):
            raise ValueError(f"strides {strides} at offset {offset} for shape {shape}")
        count = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides)) if math.prod(shape) else 0
        if offset + count > storage.length:
            raise ValueError(f"a view of {offset + count} elements in a storage of {storage.length}")
        # Strides of 0 repeat what is stored, without end: a few bytes could ask for all memory.
        if math.prod(shape) > max(storage.length, MAX_REPEATED):
            raise ValueError(f"a view that makes shape {shape} of a storage of {storage.length}")
        nbytes = DTYPES[storage.dtype].nbytes
        return Entry(info, ((storage.start + offset * nbytes, count * nbytes),), tuple(strides))


class _RebuildUntyped:
    __slots__ = ()

    def __call__(self, storage, offset, shape, strides, requires_grad, hooks, dtype, *_) -> Entry:
        """Stand-in of torch._utils._rebuild_tensor_v3: of bytes, for a dtype that has no storage class."""
        if not isinstance(storage, _Storage) or storage.dtype != "uint8" or dtype not in DTYPES:
            raise ValueError(f"a tensor of {dtype} in a storage that is not of bytes")
        storage = storage._replace(dtype=dtype, length=storage.length // DTYPES[dtype].nbytes)
        return _RebuildTensor()(storage, offset, shape, strides)


class _RebuildParameter:
    __slots__ = ()

    def __call__(self, data, *_):
        """Stand-in of torch._utils._rebuild_parameter."""
        return data


def _refuse(cls, *_):
    """Refuse what a pickle wants to do with a thing that it may only mention."""
    raise CheckpointError(
        f"carries code: its pickle asks for {cls.reference}, more than plain tensors need; refused, nothing "
        "was run. Use a .safetensors file instead"
    )


class _Mention(type):
    """Type of the stand-ins for things that a pickle mentions.

    They are classes, for only of classes the unpickler tries to make objects without a call; these refuse that too.
    """

    __call__ = __setstate__ = _refuse

    def __repr__(cls) -> str:
        return cls.reference


class _TensorUnpickler(pickle.Unpickler):
    """Unpickles nested dicts of tensors into `Entry`s; refuses to call, build or alter anything else."""

    def __init__(self, stream, members: dict[str, tuple[int, int]]):
        super().__init__(stream)
        self._members = members  # storage key: start and length in bytes
        self._mentions: dict[str, _Mention] = {}

    def find_class(self, module: str, name: str):
        """Our stand-in for a global."""
        if module == "torch" and name in _DTYPE_OF:
            return name
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _RebuildTensor()
        if module == "torch" and name in DTYPES:
            return name
        if (module, name) == ("torch.storage", _UNTYPED):
            return name
        if (module, name) == ("torch._utils", "_rebuild_tensor_v3"):
            return _RebuildUntyped()
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _RebuildParameter()
        reference = f"{module}.{name}"
        if len(self._mentions) >= MAX_MENTIONS:
            raise CheckpointError(f"mentions more than {MAX_MENTIONS} things besides tensors, such as {reference}; "
                                  "use a .safetensors file instead")
        return self._mentions.setdefault(reference, _Mention("Mention", (), {
            "__slots__": (), "__new__": _refuse, "reference": reference}))

    def persistent_load(self, pid) -> _Storage:
        """The storage that a tensor points to: ("storage", class, key, device, elements)."""
        _, storage_class, key, _, length = pid
        if isinstance(storage_class, _Mention):
            raise CheckpointError(f"holds a {storage_class!r}, expected tensors of {', '.join(_DTYPE_OF.values())}; "
                                  "save it again as one of these")
        dtype = "uint8" if storage_class == _UNTYPED else _DTYPE_OF[storage_class]
        start, nbytes = self._members[key]
        if length * DTYPES[dtype].nbytes > nbytes:
            raise ValueError(f"storage {key} has {nbytes} bytes for {length} {dtype}")
        return _Storage(dtype, start, length)


def _flatten(prefix: str, node, entries: dict[str, Entry], seen: set[int]) -> None:
    """Add the tensors below a node, named by their keys; plain numbers and texts are left out."""
    if isinstance(node, Entry):
        if prefix in entries:
            raise CheckpointError(f"has the name '{prefix}' twice; write it again with unique names")
        entries[prefix] = node
    elif isinstance(node, (dict, list, tuple)):
        if id(node) in seen:  # it may contain itself
            raise ValueError("a dict that occurs twice")
        seen.add(id(node))
        # Not node.items(): the pickle can give an OrderedDict another attribute of that name.
        for key, value in dict.items(node) if isinstance(node, dict) else enumerate(node):
            _flatten(f"{prefix}.{key}" if prefix else str(key), value, entries, seen)
