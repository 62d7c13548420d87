"""MindSpore .ckpt: a protobuf message, `Checkpoint` of mindspore/train/checkpoint_pb2.py.

    Checkpoint {repeated Value value = 1}
    Value {string tag = 1; oneof {TensorProto tensor = 2; MapTensorProto maptensor = 3}}
    TensorProto {repeated int64 dims = 1; string tensor_type = 2; bytes tensor_content = 3}

A big tensor is several values with one tag and the full dims, to be joined. It is read by walking from field to
field: a protobuf library takes the whole file into memory and ends at 2 GiB.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Callable

import numpy as np

from ldm.checkpoints.formats.index import DTYPES, CheckpointError, Entry, TensorInfo, checked_info, damaged

# A protobuf bytes field ends at 2 GiB. MindSpore cuts at the same 512 MiB when it saves, and joins when it loads.
SLICE_BYTES = 512 * 1024 * 1024
MAX_NAME_BYTES = 65536
# Where contents begin, so that whoever maps the file may compute with them; a varint has ten digits at most.
ALIGNMENT, MAX_DIGITS = 4, 10

_VARINT, _BYTES = 0, 2  # protobuf wire types; MindSpore uses no others
_DTYPE_OF = {row.mindspore: dtype for dtype, row in DTYPES.items()}


def index_ckpt(file, size: int) -> dict[str, Entry]:
    """Where each tensor of a MindSpore .ckpt lies; see `ldm.checkpoints.formats`."""
    file.seek(max(size - 17, 0))
    if file.read(7) == b"crc_num":  # MindSpore can add this and ten digits, which are no protobuf
        size -= 17
    entries: dict[str, Entry] = {}
    for number, wire, span in _fields(file, 0, size):
        value = _value(file, span) if (number, wire) == (1, _BYTES) else None
        if value is None:
            continue
        name, entry = value
        known = entries.get(name)
        if known:
            if known.nbytes == known.info.nbytes:
                raise CheckpointError(f"has the name '{name}' twice; write it again with unique names")
            if known.info != entry.info:
                raise damaged(f"'{name}' changes from {known.info} to {entry.info}")
            entry = entry._replace(extents=known.extents + entry.extents)
        if entry.nbytes > entry.info.nbytes:
            raise damaged(f"'{name}', {entry.info}, has {entry.nbytes} bytes, expected {entry.info.nbytes}")
        entries[name] = entry
    for name, entry in entries.items():
        if entry.nbytes < entry.info.nbytes:
            raise damaged(f"is cut short: '{name}' has {entry.nbytes} of its {entry.info.nbytes} bytes")
    return entries


def _value(file, span: tuple[int, int]) -> tuple[str, Entry] | None:
    """Name and place of the (slice of a) tensor in one `Value`; None if it holds none."""
    value = _message(file, span)
    name = _text(file, value[1, _BYTES])
    if value[3, _BYTES]:
        raise CheckpointError(f"'{name}' is a MapParameter, expected plain tensors; save the network without it")
    if not value[2, _BYTES]:
        return None
    tensor = _message(file, value[2, _BYTES][-1])
    stored = _text(file, tensor[2, _BYTES])
    if name is None or stored is None or not tensor[3, _BYTES]:
        raise damaged(f"has a tensor without name, type or content at byte {span[0]}")
    if stored == "str":
        raise CheckpointError(f"'{name}' is a string, expected a tensor; save without it (see append_dict)")
    start, end = tensor[3, _BYTES][-1]
    dims = tensor[1, _VARINT]
    info = checked_info(name, dims, _DTYPE_OF.get(stored), stored)
    if dims == [0] and start < end:
        info = info._replace(shape=())  # the old way to write a scalar
    return name, Entry(info, ((start, end - start),))


def _message(file, span: tuple[int, int]) -> dict[tuple[int, int], list]:
    """The values of a small message, listed by field number and wire type."""
    found = defaultdict(list)
    for number, wire, value in _fields(file, *span):
        found[number, wire].append(value)
    return found


def _fields(file, position: int, end: int):
    """Yield (field number, wire type, int or (start, end) range) of a protobuf message, seeking over payloads."""
    while position < end:
        file.seek(position)
        window = file.read(min(20, end - position))  # a key and a length of at most ten bytes each
        key, used = _read_varint(window, 0, position)
        number, wire = key >> 3, key & 7
        if number == 0 or wire not in (_VARINT, _BYTES):
            raise damaged(f"is no MindSpore checkpoint, or damaged, at byte {position}")
        value, used = _read_varint(window, used, position)
        stop = position + used
        if wire == _BYTES:
            value = (stop, stop + value)
            stop = value[1]
        if stop > end:
            excess = f"the record at byte {position} ends at byte {stop}, expected at most {end}"
            raise damaged(f"is cut short or no MindSpore checkpoint: {excess} ({stop - end} missing)")
        yield number, wire, value
        position = stop


def _read_varint(data: bytes, at: int, position: int) -> tuple[int, int]:
    """The protobuf integer at data[at:], and where it ends; `position` is for the message only."""
    value = 0
    for index, byte in enumerate(data[at : at + 10]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, at + index + 1
    raise damaged(f"is cut short or damaged inside the record at byte {position}")


def _text(file, spans: list[tuple[int, int]]) -> str | None:
    """The last of some texts, which is the one that counts in protobuf; None if there is none."""
    if not spans:
        return None
    start, end = spans[-1]
    if end - start > MAX_NAME_BYTES:
        raise damaged(f"has a name of {end - start} bytes at byte {start}")
    file.seek(start)
    try:
        return file.read(end - start).decode("utf-8")
    except UnicodeDecodeError as error:
        raise damaged(f"has a name that is no UTF-8 at byte {start}") from error


def write_ckpt(write: Callable, infos: dict, payload: Callable) -> None:
    """Write a MindSpore .ckpt; see `ldm.checkpoints.formats`."""
    position = 0
    for name, info in infos.items():
        # A variable here would keep the tensor while the next one is read.
        position = _write_tensor(write, name, info, payload(name), position)


def _write_tensor(write: Callable, name: str, info: TensorInfo, data: np.ndarray, position: int) -> int:
    for start in range(0, max(len(data), 1), SLICE_BYTES):
        part = data[start : start + SLICE_BYTES]
        head = record_head(name, info, len(part), position)
        write(head)
        write(part)
        position += len(head) + len(part)
    return position


def record_head(name: str, info: TensorInfo, nbytes: int, position: int = 0) -> bytes:
    """All of one `Value` record before its tensor_content of `nbytes` bytes, which has to follow.

    The content's length is written with as many idle digits as let it begin at a multiple of ALIGNMENT in a file that
    has the record at `position`.
    """
    tag, stored = name.encode("utf-8"), DTYPES[info.dtype].mindspore.encode("ascii")
    sizes = b"".join(b"\x08" + varint(n) for n in info.shape) + b"\x12" + varint(len(stored)) + stored + b"\x1a"
    for digits in range(len(varint(nbytes)), MAX_DIGITS + 1):
        tensor = sizes + varint(nbytes, digits)
        value = b"\x0a" + varint(len(tag)) + tag + b"\x12" + varint(len(tensor) + nbytes) + tensor
        head = b"\x0a" + varint(len(value) + nbytes) + value
        if (position + len(head)) % ALIGNMENT == 0:
            break
    return head


def varint(value: int, digits: int = 1) -> bytes:
    """An integer >= 0 as a protobuf varint of so many digits at least; the last ones may be zeros."""
    out = bytearray()
    while value >= 0x80 or len(out) + 1 < digits:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
