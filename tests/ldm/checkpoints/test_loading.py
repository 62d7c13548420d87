"""Weights as networks take them: finite after the cast, floating point, and nothing that is not known."""
from __future__ import annotations

import numpy as np
import pytest
from mindspore import dtype as mstype
from mindspore import nn

from ldm.checkpoints.file import CheckpointError, open_checkpoint, save_arrays
from ldm.checkpoints.layout import Layout
from ldm.checkpoints.loading import Part, check, load, plan


def dense(tmp_path, values, dtype=mstype.float32) -> tuple:
    """A network of one weight, and the open file whose tensor "weight" has these values."""
    save_arrays(tmp_path / "x.safetensors", {"weight": values})
    cell = nn.Dense(values.shape[1], values.shape[0], has_bias=False, dtype=dtype)
    return cell, open_checkpoint(tmp_path / "x.safetensors")


@pytest.mark.parametrize("value, stored, wanted, words", [
    (1e200, "float64", "float32", "holds values up to 1e[+]200, beyond the range of float32; the file is damaged"),
    (1e30, "float32", "float16", "holds values up to 1e[+]30, beyond the range of float16; use --dtype float32"),
    (1e200, "float64", "float16", "holds values up to 1e[+]200, beyond the range of float16; the file is damaged"),
    (np.inf, "float16", "float32", "holds NaN or infinite values; the file is damaged"),
    (np.nan, "float64", "float16", "holds NaN or infinite values; the file is damaged")])
def test_values_that_are_not_finite_after_the_cast(tmp_path, value, stored, wanted, words):
    cell, file = dense(tmp_path, np.array([[0, value]], stored), getattr(mstype, wanted))
    with file:
        part = Part({"weight": (1, 2)}, file, Layout())
        check([part])
        with pytest.raises(CheckpointError, match="x.safetensors: weight " + words):
            load(cell, part)
        with pytest.raises(CheckpointError, match="x.safetensors: weight " + words):
            plan(part, Layout(), wanted)["weight"][1]()


def test_rows_stacked_from_two_dtypes_become_the_first(tmp_path):
    """As far as they fit."""
    stack = Layout(stacked=("^qk$", ("q", "k")))
    for value in (2.0, 1e6):
        rows = {"q": np.ones((1, 2), np.float16), "k": np.full((1, 2), value, np.float32)}
        save_arrays(tmp_path / "x.safetensors", rows)
        with open_checkpoint(tmp_path / "x.safetensors") as file:
            info, read = plan(Part({"qk": (2, 2)}, file, stack), Layout())["qk"]
            if value == 2:
                assert info.dtype == "float16" and read().tolist() == [[1, 1], [2, 2]]
                continue
            with pytest.raises(CheckpointError, match="q holds values up to 1e[+]06, beyond the range of float16"):
                read()


@pytest.mark.parametrize("stored, value", [("float64", 1e38), ("float32", 3e38), ("float32", 1e-30),
                                           ("float16", 65504)])
def test_large_values_that_fit_are_taken(tmp_path, stored, value):
    """Also where their sum does not fit."""
    cell, file = dense(tmp_path, np.full((2, 8), value, stored))
    with file:
        part = Part({"weight": (2, 8)}, file, Layout())
        load(cell, part)
        kept = plan(part, Layout())["weight"][1]()
    np.testing.assert_array_equal(cell.weight.asnumpy(), np.full((2, 8), np.float32(value)))
    np.testing.assert_array_equal(kept, np.full((2, 8), value, stored))
    assert kept.dtype == stored


@pytest.mark.parametrize("stored", ["int8", "uint8", "int64", "bool"])
def test_integers_are_no_weights(tmp_path, stored):
    """Those that carry nothing may be of any dtype."""
    arrays = {"weight": np.ones((1, 2), stored), "ids": np.ones(3, stored)}
    save_arrays(tmp_path / "x.safetensors", arrays)
    with open_checkpoint(tmp_path / "x.safetensors") as file:
        with pytest.raises(CheckpointError, match=f"1 .*: weight is {stored}, expected floating point$"):
            check([Part({"weight": (1, 2)}, file, Layout(ignored="^ids$"))])
    save_arrays(tmp_path / "x.safetensors", {**arrays, "weight": np.ones((1, 2), np.float16)})
    with open_checkpoint(tmp_path / "x.safetensors") as file:
        check([Part({"weight": (1, 2)}, file, Layout(ignored="^ids$"))])


def test_a_scalar_in_place_of_stacked_rows_is_of_another_shape(tmp_path):
    save_arrays(tmp_path / "x.safetensors", {name: np.float32(1) for name in ("q", "k")})
    with open_checkpoint(tmp_path / "x.safetensors") as file:
        with pytest.raises(CheckpointError, match=r"1 of another shape: q \(\(\), \(\)\), expected \(2, 3\)"):
            check([Part({"qk": (2, 3)}, file, Layout(stacked=("^qk$", ("q", "k"))))])
