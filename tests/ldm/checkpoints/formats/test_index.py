"""8-bit floats: every code against the formula of its format, in files of torch and of safetensors."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from ldm.checkpoints.formats.index import WIDENED, TensorInfo, kept_dtype
from ldm.checkpoints.formats.safetensors_file import index_safetensors
from ldm.checkpoints.formats.torch_zip import index_torch
from tests.support.arrays import DATA

# Bits of the exponent and of the fraction, and the codes (without sign) of infinity.
FORMATS = {"float8_e4m3fn": (4, 3, ()), "float8_e5m2": (5, 2, (0x7C,))}
CODES = np.arange(256, dtype=np.uint8)


def value(code: int, exponent_bits: int, fraction_bits: int, infinities: tuple) -> float:
    """A code by the definition of a float; all ones are NaN, and above infinity too."""
    sign, code = -1.0 if code & 0x80 else 1.0, code & 0x7F
    exponent, fraction = code >> fraction_bits, code & (1 << fraction_bits) - 1
    if code in infinities:
        return sign * float("inf")
    if code == 0x7F or infinities and code > infinities[0]:
        return float("nan")
    bias = (1 << exponent_bits - 1) - 1
    if exponent == 0:
        return sign * fraction * 2.0 ** (1 - bias - fraction_bits)
    return sign * (1 + fraction / (1 << fraction_bits)) * 2.0 ** (exponent - bias)


def expected(dtype: str) -> np.ndarray:
    return np.array([value(int(code), *FORMATS[dtype]) for code in CODES], np.float32)


@pytest.mark.parametrize("dtype, greatest, least, nans", [("float8_e4m3fn", 448.0, 2.0**-9, 2),
                                                         ("float8_e5m2", 57344.0, 2.0**-16, 6)])
def test_all_codes(dtype, greatest, least, nans):
    stored, widen = WIDENED[dtype]
    assert stored is np.uint8
    got = widen(CODES.reshape(2, 8, 16))
    assert got.shape == (2, 8, 16) and got.dtype == np.float32
    np.testing.assert_array_equal(got.ravel(), expected(dtype))
    np.testing.assert_array_equal(np.signbit(got.ravel()[[0, 0x80]]), [False, True])
    finite = got[np.isfinite(got)]
    assert (finite.max(), finite[finite > 0].min(), np.isnan(got).sum()) == (greatest, least, nans)
    assert np.isinf(got).sum() == 2 * len(FORMATS[dtype][2])
    assert widen(np.array(0x38, np.uint8)).shape == ()  # a scalar
    np.testing.assert_array_equal(got.astype(kept_dtype(dtype)).astype(np.float32), got)
    assert kept_dtype("bfloat16") == "bfloat16"


def test_a_file_of_torch():
    """tests/record/record_float8.py; torch widened the third itself."""
    path = DATA / "float8.pt"
    with open(path, "rb") as file:
        entries = index_torch(file, path.stat().st_size)
        content = {}
        for name, entry in entries.items():
            (start, length), = entry.extents
            file.seek(start)
            content[name] = np.frombuffer(file.read(length), np.uint8)
    assert entries["e4m3fn"].info == TensorInfo((256,), "float8_e4m3fn")
    assert entries["e5m2"].info == TensorInfo((16, 16), "float8_e5m2") and entries["e5m2"].strides == (1, 16)
    assert entries["uint16"].info == TensorInfo((2,), "uint16")
    np.testing.assert_array_equal(content["e4m3fn"], CODES)
    widened = WIDENED["float8_e5m2"][1](content["e5m2"])
    np.testing.assert_array_equal(widened, expected("float8_e5m2"))
    np.testing.assert_array_equal(widened, content["half"].view(np.float16))


def test_a_safetensors_file(tmp_path):
    path, header = tmp_path / "x.safetensors", {
        "a": {"dtype": "F8_E4M3", "shape": [16, 16], "data_offsets": [0, 256]},
        "b": {"dtype": "F8_E5M2", "shape": [256], "data_offsets": [256, 512]}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(CODES) * 2)
    with open(path, "rb") as file:
        entries = index_safetensors(file, os.path.getsize(path))
    assert [entry.info for entry in entries.values()] == [
        TensorInfo((16, 16), "float8_e4m3fn"), TensorInfo((256,), "float8_e5m2")]
    assert [entry.extents for entry in entries.values()] == [((8 + len(text), 256),), ((264 + len(text), 256),)]
