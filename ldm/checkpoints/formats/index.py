"""What the formats share: the index of a file, dtypes and their names, and the error for a file that is wrong.

An index is a dict of `Entry` by tensor name, in file order.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ldm.errors import UserError
from ldm.files import printable

MAX_INDEX_BYTES = 100_000_000  # the safetensors limit of its header, used for a torch pickle too


class Dtype(NamedTuple):
    """Size of one element in bytes, and what the formats call the dtype."""

    nbytes: int
    safetensors: str
    mindspore: str
    torch: str | None


DTYPES = {
    "float64": Dtype(8, "F64", "Float64", "DoubleStorage"),
    "float32": Dtype(4, "F32", "Float32", "FloatStorage"),
    "float16": Dtype(2, "F16", "Float16", "HalfStorage"),
    "bfloat16": Dtype(2, "BF16", "BFloat16", "BFloat16Storage"),
    "float8_e4m3fn": Dtype(1, "F8_E4M3", "Float8E4M3FN", None),
    "float8_e5m2": Dtype(1, "F8_E5M2", "Float8E5M2", None),
    "int64": Dtype(8, "I64", "Int64", "LongStorage"),
    "int32": Dtype(4, "I32", "Int32", "IntStorage"),
    "int16": Dtype(2, "I16", "Int16", "ShortStorage"),
    "int8": Dtype(1, "I8", "Int8", "CharStorage"),
    "uint64": Dtype(8, "U64", "UInt64", None),
    "uint32": Dtype(4, "U32", "UInt32", None),
    "uint16": Dtype(2, "U16", "UInt16", None),
    "uint8": Dtype(1, "U8", "UInt8", "ByteStorage"),
    "bool": Dtype(1, "BOOL", "Bool", "BoolStorage"),
}


class CheckpointError(UserError):
    """A checkpoint file that cannot be read or written, with the reason and the way out in one line.

    The formats leave the path out of the reason; `open_checkpoint` puts it in front. Names of files and tensors may
    hold line breaks and terminal codes, which are shown as `?`.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))


class TensorInfo(NamedTuple):
    """Shape and numpy dtype name ("float32", "int64", also others in `WIDENED`) of one tensor in a file."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Its size in a file."""
        return math.prod(self.shape) * DTYPES[self.dtype].nbytes


class Entry(NamedTuple):
    """Where one tensor lies: (start, length) byte ranges to join, and strides in elements unless row-major."""

    info: TensorInfo
    extents: tuple[tuple[int, int], ...]
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """The sum of its byte ranges."""
        return sum(length for _, length in self.extents)


def damaged(reason: str) -> CheckpointError:
    """The error for a file that its writer cannot have meant so."""
    return CheckpointError(f"{reason}; download or copy it again")


def check_end(end: int, size: int) -> None:
    """Raise `CheckpointError` if a file that should reach to byte `end` has only `size` bytes."""
    if end > size:
        raise damaged(f"is cut short: it needs {end} bytes, the file has {size} ({end - size} missing)")


def checked_info(name: str, shape, dtype: str | None, stored: str) -> TensorInfo:
    """A `TensorInfo`, once its dtype is one we know and its shape one that numpy can hold.

    Args:
        name: of the tensor, for the message.
        shape: as the file gives it.
        dtype: a key of `DTYPES`, or None if the file names another.
        stored: what the file calls the dtype, for the message.
    """
    if dtype not in DTYPES:
        raise CheckpointError(f"'{name}' has dtype {stored!r:.40}, expected one of {', '.join(DTYPES)}")
    sane = len(shape) <= 32 and all(type(n) is int and n >= 0 for n in shape)
    if not sane or math.prod(n for n in shape if n) >= 2**60:
        raise damaged(f"'{name}' has an impossible shape, {str(shape):.80}")
    return TensorInfo(tuple(shape), dtype)


def widen_bfloat16(bits: np.ndarray) -> np.ndarray:
    """(...) uint16 bit patterns of bfloat16 -> (...) float32, exact."""
    wide = np.empty(bits.shape, np.uint32)
    wide[...] = bits
    wide <<= np.uint32(16)  # a plain 16 would make a scalar an int64
    return wide.view(np.float32)


def widen_float8_e5m2(bits: np.ndarray) -> np.ndarray:
    """(...) uint8 bit patterns of float16's sign, exponent and first 2 bits of fraction -> (...) float32, exact."""
    wide = bits.reshape(-1).astype(np.uint16) << 8
    return wide.view(np.float16).astype(np.float32).reshape(bits.shape)


def widen_float8_e4m3fn(bits: np.ndarray) -> np.ndarray:
    """(...) uint8 bit patterns of a sign, 4 bits of exponent and 3 of fraction -> (...) float32, exact; no infinities.

    At the same place in a float16, whose exponent counts from 15 instead of 7, they are 2**-8 of their value.
    """
    flat = bits.reshape(-1)
    wide = flat.astype(np.uint16)
    values = ((wide & 0x80) << 8 | (wide & 0x7F) << 7).view(np.float16).astype(np.float32)
    values *= 256
    values[(flat & 0x7F) == 0x7F] = np.nan
    return values.reshape(bits.shape)


# What numpy has no name for: the integers its bits are read as, and how those become float32.
WIDENED = {
    "bfloat16": (np.uint16, widen_bfloat16),
    "float8_e4m3fn": (np.uint8, widen_float8_e4m3fn),
    "float8_e5m2": (np.uint8, widen_float8_e5m2),
}


def kept_dtype(dtype: str) -> str:
    """What a tensor of this dtype is written as where it is to stay as it is: float16 holds all 8-bit floats."""
    return "float16" if dtype.startswith("float8") else dtype


def narrow_bfloat16(array: np.ndarray) -> np.ndarray:
    """(...) float -> (...) uint16 bit patterns of bfloat16, rounded to nearest even."""
    values = np.asarray(array, np.float32, order="C")
    bits = values.view(np.uint32)
    rounded = (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16
    # The carry would turn a NaN into an infinity or a zero.
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)
