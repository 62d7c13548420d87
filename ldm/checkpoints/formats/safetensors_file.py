"""safetensors: 8 bytes of header length, a JSON header, then the tensors without gaps."""

from __future__ import annotations

import json
import struct
from typing import Callable

from ldm.checkpoints.formats.index import (
    DTYPES,
    MAX_INDEX_BYTES,
    CheckpointError,
    Entry,
    check_end,
    checked_info,
    damaged,
)

_DTYPE_OF = {row.safetensors: dtype for dtype, row in DTYPES.items()}


def index_safetensors(file, size: int) -> dict[str, Entry]:
    """Where each tensor of a .safetensors file lies; see `ldm.checkpoints.formats`."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > MAX_INDEX_BYTES:
        raise damaged(f"is not a safetensors file: no sane header length in its {size} bytes")
    start = 8 + length
    check_end(start, size)
    try:
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_unique_pairs)
        header.pop("__metadata__", None)
        entries = {
            name: _entry(name, row["dtype"], row["shape"], *row["data_offsets"], start)
            for name, row in header.items()
        }
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(f"has a damaged safetensors header ({str(error):.80})") from error
    _check_no_gaps(entries, start, size)
    return entries


def _unique_pairs(pairs: list) -> dict:
    """A JSON object as a dict, unless a name occurs twice: `json` would drop the first."""
    result: dict = {}
    for name, value in pairs:
        if name in result:
            raise CheckpointError(f"has the name '{name}' twice in its header; write it again with unique names")
        result[name] = value
    return result


def _entry(name: str, code: str, shape: list, begin: int, end: int, start: int) -> Entry:
    info = checked_info(name, shape, _DTYPE_OF.get(code), code)
    if type(begin) is not int or type(end) is not int or begin < 0 or end - begin != info.nbytes:
        raise damaged(f"'{name}', {info}, needs {info.nbytes} bytes, its header gives {begin} to {end}")
    return Entry(info, ((start + begin, end - begin),))


def _check_no_gaps(entries: dict[str, Entry], start: int, size: int) -> None:
    """The tensors have to fill the file from `start` to its end, as the format demands."""
    at = start
    for name, entry in sorted(entries.items(), key=lambda item: item[1].extents):
        begin, length = entry.extents[0]
        if begin != at:
            raise damaged(f"'{name}' begins at byte {begin}, expected {at}: gap or overlap")
        at += length
    check_end(at, size)
    if at < size:
        raise damaged(f"has {size - at} bytes after its last tensor, expected none")


def write_safetensors(write: Callable, infos: dict, payload: Callable, metadata: dict[str, str]) -> None:
    """Write a .safetensors file with these texts in its header; see `ldm.checkpoints.formats`."""
    header: dict = {"__metadata__": {"format": "np", **metadata}}
    at = 0
    for name, info in infos.items():
        end = at + info.nbytes
        header[name] = {"dtype": DTYPES[info.dtype].safetensors, "shape": info.shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)  # aligns the tensors for who maps the file into memory
    write(struct.pack("<Q", len(text)) + text)
    for name in infos:
        write(payload(name))
