"""Arrays: from files, seeded, compared."""
from __future__ import annotations

from pathlib import Path

import numpy as np
from mindspore import Tensor
from PIL import Image

from ldm.checkpoints.file import open_checkpoint

DATA = Path(__file__).resolve().parents[1] / "data"
RNG = np.random.default_rng(0)


def arrays(path) -> dict:
    """All tensors of a checkpoint file."""
    with open_checkpoint(path) as file:
        return {name: file.read(name) for name in file.tensors}


def assert_equal(a: dict, b: dict) -> None:
    """The same names, and under each the same array."""
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def reference() -> dict:
    """Numbers recorded with diffusers on the stand-ins (tests/record/record_sd.sh)."""
    with np.load(DATA / "sd_reference.npz") as recorded, np.load(DATA / "sd_control_reference.npz") as control:
        return {**recorded, **control}


def psnr(a, b) -> float:
    """Peak signal-to-noise ratio of 8-bit pictures in dB."""
    error = np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def pictures(folder) -> list:
    """The single pictures a run wrote, as arrays."""
    return [np.asarray(Image.open(path)) for path in sorted((Path(folder) / "samples").glob("*.png"))]


def normal(*shape) -> np.ndarray:
    """Standard normal float32 numbers, the next of one stream."""
    return RNG.standard_normal(shape).astype(np.float32)


def fill(cell) -> None:
    """Random values for all parameters, so that no bias or gain is trivial."""
    for _, parameter in cell.parameters_and_names():
        parameter.set_data(Tensor(normal(*parameter.shape), parameter.dtype))
