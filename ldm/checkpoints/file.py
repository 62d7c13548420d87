"""One checkpoint file: what is in it, read one tensor at a time, written one tensor at a time.

Reads `.safetensors`, MindSpore `.ckpt` and torch `.bin` / `.pt` / `.pth` (zip archives only) by content, writes the
first two; their layouts are in `ldm/formats/`. Opening a file reads its index only, and neither side ever holds more
than one tensor. All bytes are taken as little-endian, as all hosts we run on are.

A `.ckpt` cut exactly between two tensors is a shorter, valid file: who loads it has to compare the names.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import shutil
import stat
from pathlib import Path
from typing import BinaryIO, Callable, Iterator

import numpy as np

from ldm.checkpoints.formats.index import (
    DTYPES,
    MAX_INDEX_BYTES,
    WIDENED,
    CheckpointError,
    Entry,
    TensorInfo,
    damaged,
    narrow_bfloat16,
)
from ldm.checkpoints.formats.mindspore_ckpt import index_ckpt, write_ckpt
from ldm.checkpoints.formats.safetensors_file import index_safetensors, write_safetensors
from ldm.checkpoints.formats.torch_zip import index_torch
from ldm.files import reason, replacing

__all__ = ["CheckpointError", "CheckpointFile", "TensorInfo", "mapping", "open_checkpoint", "save_arrays",
           "write_checkpoint"]


# Tensors of so many bytes are mapped, others copied: a mapping takes whole pages.
MAPPED_BYTES = 1 << 20


class CheckpointFile:
    """An open checkpoint file, made by `open_checkpoint`.

    Attributes:
        path: the file.
        tensors: `TensorInfo` by name, in file order.
    """

    def __init__(self, path: Path, file, entries: dict[str, Entry]):
        self.path = path
        self.tensors = {name: entry.info for name, entry in entries.items()}
        self._file = file
        self._entries = entries

    def __enter__(self) -> CheckpointFile:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; `read` no longer works."""
        self._file.close()

    def read(self, name: str) -> np.ndarray:
        """Read one tensor.

        Args:
            name: one of `tensors`.

        Returns:
            An array in its own contiguous, writable memory, of the stored shape and dtype; bfloat16 and 8-bit floats
            come as float32. A large one is mapped: its memory is the file's in the cache, and copied only where it is
            written to. Who changes the file meanwhile should write a new one and rename it, as `write_checkpoint` does.

        Raises:
            CheckpointError: no such name, or the file shrank, failed or did not fit into memory.
        """
        if name not in self._entries:
            raise CheckpointError(f"{self.path} has no tensor '{name}' among its {len(self._entries)}")
        entry = self._entries[name]
        shape, dtype = entry.info
        try:
            bits, widen = WIDENED.get(dtype, (dtype, None))
            stored = np.dtype(bits)
            flat = self._bytes(name, stored.itemsize).view(stored)
            if entry.strides is None:
                array = flat.reshape(shape)
            else:
                steps = [stride * stored.itemsize for stride in entry.strides]
                # Copies unless it is contiguous already. (ascontiguousarray would give a scalar one dimension.)
                array = np.asarray(np.lib.stride_tricks.as_strided(flat, shape, steps), order="C")
            return widen(array) if widen else array
        except MemoryError as error:
            raise CheckpointError(f"{self.path}: '{name}', {shape} {dtype}, does not fit into memory") from error
        except OSError as error:
            raise damaged(f"{self.path}: reading '{name}' failed: {error.strerror}") from error

    def _bytes(self, name: str, alignment: int) -> np.ndarray:
        """The bytes of a tensor, mapped if it is large, in one piece, and begins at a multiple of `alignment`."""
        entry = self._entries[name]
        start, length = entry.extents[0]
        if len(entry.extents) == 1 and length >= MAPPED_BYTES and start % alignment == 0:
            before = start % mmap.ALLOCATIONGRANULARITY  # a mapping begins with a page
            with contextlib.suppress(ValueError):  # it would end behind the file: reading tells how much is gone
                pages = mmap.mmap(self._file.fileno(), before + length, access=mmap.ACCESS_COPY, offset=start - before)
                return np.frombuffer(pages, np.uint8, offset=before)
        raw, at = np.empty(entry.nbytes, np.uint8), 0
        for start, length in entry.extents:
            self._file.seek(start)
            got = self._file.readinto(raw[at : at + length])
            if got != length:
                raise CheckpointError(f"{self.path} shrank while open: {length - got} bytes of '{name}' are gone")
            at += length
        return raw


def mapping(array: np.ndarray) -> mmap.mmap | None:
    """The mapping that an array is in, which `CheckpointFile.read` made or what was cut from it; None if it is none."""
    while isinstance(array, np.ndarray):
        array = array.base
    owner = getattr(array, "obj", None)  # of the memoryview that the first array was made from
    return owner if isinstance(owner, mmap.mmap) else None


def open_checkpoint(path) -> CheckpointFile:
    """Open a checkpoint and read its index.

    Args:
        path: a `.safetensors`, MindSpore `.ckpt` or torch zip file; the content decides which, not the ending.

    Returns:
        The open file; use it with `with`, or close it.

    Raises:
        CheckpointError: missing, empty, cut short, damaged, of another kind, or holding what we cannot represent. No
            code that a pickle carries is ever run.
    """
    file, path = _opened(path), Path(path)
    try:
        entries = _index_reader(file, path.suffix.lower())(file, os.fstat(file.fileno()).st_size)
        if not entries:
            raise CheckpointError("holds no tensor, expected at least one; check that this is the right file")
        return CheckpointFile(path, file, entries)
    except CheckpointError as error:
        file.close()
        raise CheckpointError(f"{path}: {error}") from error


def _opened(path) -> BinaryIO:
    """A regular file, open for reading: to open a pipe would wait for its other end, and devices have no size."""
    try:
        if not str(path) or "\0" in str(path):
            raise CheckpointError(f"the path '{path}' is empty or holds a NUL character; name a checkpoint file")
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise CheckpointError(f"{path} is a folder, expected one checkpoint file; name a file in it")
        if not stat.S_ISREG(mode):
            raise CheckpointError(f"{path} is not a regular file, expected one checkpoint file; save it as one")
        return open(path, "rb")
    except FileNotFoundError as error:
        folder = Path(path).parent
        where = "its folder exists" if folder.is_dir() else f"nor does the folder {folder}"
        raise CheckpointError(f"{path} does not exist ({where}); check the path or download the file") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {reason(error)}; check its permissions") from error


def _index_reader(file, suffix: str) -> Callable:
    """The index reader for a file, by its first bytes; the ending only decides what they leave open."""
    head = file.read(64)
    if not head:
        raise damaged("is empty (0 bytes)")
    if head.startswith(b"PK"):
        return index_torch
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_INDEX_BYTES:
        return index_safetensors
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError("is a Git LFS pointer, not the file itself; run `git lfs pull` or download it")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError("is a web page, not a checkpoint; download the file itself")
    if head[1:4] == b"\x5e\x3a\x7f":  # the byte before it tells the cipher
        raise CheckpointError("is an encrypted MindSpore checkpoint; save it again without a key")
    if head[:1] == b"\x80":
        raise CheckpointError("is a pickle of an old torch, which is not read; save it again as .safetensors")
    if suffix == ".ckpt" or head[:1] == b"\n":
        return index_ckpt
    if suffix == ".safetensors":
        return index_safetensors
    raise CheckpointError("is not a checkpoint; expected .safetensors, a MindSpore .ckpt or a torch zip archive")


def write_checkpoint(
    path, infos: dict[str, TensorInfo], read: Callable[[str], np.ndarray], metadata: dict[str, str] | None = None
) -> str:
    """Write a checkpoint tensor by tensor: all of it, or nothing.

    The file is written under a temporary name beside `path` and put in place when complete. Until then an older file
    stays as it is, and after any failure it still does.

    Args:
        path: ends in `.safetensors` or `.ckpt`; its folder is made if missing.
        infos: what to write, in this order.
        read: called once per name, returns an array of the named shape, which is cast to the named dtype.
        metadata: texts for the header of a `.safetensors`; a `.ckpt` has no place for them and leaves them out.

    Returns:
        The sha256 of the file, 64 hex digits.

    Raises:
        CheckpointError: another ending, nothing to write, a wrong shape, a value that overflows the dtype, too
            little space, or no permission.
    """
    path = Path(path)
    if path.suffix not in (".ckpt", ".safetensors"):
        raise CheckpointError(f"{path} ends in '{path.suffix}', expected .safetensors or .ckpt")
    if not infos:
        raise CheckpointError(f"{path}: no tensor to write, expected at least one")
    for name, info in infos.items():
        if info.dtype not in DTYPES:
            raise CheckpointError(f"{path}: '{name}' has dtype '{info.dtype}', expected one of {', '.join(DTYPES)}")
    digest = hashlib.sha256()
    with _written(path, sum(info.nbytes for info in infos.values())) as file:

        def write(data) -> None:
            digest.update(data)
            file.write(data)

        def payload(name: str) -> np.ndarray:
            return _payload(path, name, read(name), infos[name])

        if path.suffix == ".ckpt":
            write_ckpt(write, infos, payload)
        else:
            write_safetensors(write, infos, payload, metadata or {})
    return digest.hexdigest()


def save_arrays(path, arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> str:
    """Write arrays that are in memory; see `write_checkpoint` for the rest.

    Args:
        path: ends in `.safetensors` or `.ckpt`.
        arrays: by name, written in this order with their own shapes and dtypes.
        metadata: texts for the header of a `.safetensors`.

    Returns:
        The sha256 of the file, 64 hex digits.
    """
    infos = {name: TensorInfo(np.shape(array), np.asarray(array).dtype.name) for name, array in arrays.items()}
    return write_checkpoint(path, infos, arrays.__getitem__, metadata)


def _payload(path: Path, name: str, array: np.ndarray, info: TensorInfo) -> np.ndarray:
    """The flat uint8 bytes of an array as `info` wants it."""
    array = np.asarray(array)
    if array.shape != tuple(info.shape):
        raise CheckpointError(f"{path}: '{name}' came with shape {array.shape}, expected {info.shape}")
    try:
        with np.errstate(over="raise"):
            narrow = info.dtype == "bfloat16"
            array = narrow_bfloat16(array) if narrow else np.asarray(array, info.dtype, order="C")
    except FloatingPointError as error:
        raise CheckpointError(f"{path}: '{name}' has values beyond the range of {info.dtype}; save wider") from error
    return array.reshape(-1).view(np.uint8)


@contextlib.contextmanager
def _written(path: Path, needed: int) -> Iterator:
    """`ldm.files.replacing` with its errors as those of a checkpoint, that tell how much room there is."""
    try:
        with replacing(path, needed) as file:
            yield file
    except OSError as error:
        way_out = "check the permissions, free some space or name another folder"
        free = _free_bytes(path.parent)
        if free < needed:
            raise CheckpointError(f"{path} needs {needed} bytes, {free} are free ({needed - free} short); "
                                  f"{way_out}") from error
        raise CheckpointError(f"{path} cannot be written: {reason(error)}; it needs {needed} bytes, {free} are free; "
                              f"{way_out}") from error


def _free_bytes(folder: Path) -> int:
    """Free space where a folder is or would be made."""
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free
