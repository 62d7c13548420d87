"""The state a training goes on from: written with a checksum, and taken up only if it is whole and makes sense."""
from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from ip_adapter.config import STATE
from ldm.checkpoints.file import CheckpointError, open_checkpoint, save_arrays
from ldm.errors import UserError

CHECKSUM = "run.checksum"
MAX_STEP = 10**9
# What a number of the settings is called in messages, where it is no flag.
DESCRIPTIONS = {"rows": "a data set of {} rows"}


def checksum(arrays: dict) -> np.ndarray:
    """(16,) uint8, of all names, types, shapes and values in whatever order; that of `CHECKSUM` itself is left out."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays.keys() - {CHECKSUM}):
        array = np.asarray(arrays[name], order="C")
        digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode("utf-8", "surrogatepass"))
        digest.update(array.reshape(-1).view(np.uint8))
    return np.frombuffer(digest.digest(), np.uint8)


def write_state(path: Path, optimizer: dict, numbers: dict) -> None:
    """Write a state.

    Args:
        path: of the file.
        optimizer: what `AdamW.state` gives.
        numbers: name -> integer or integers: the settings that must not change, `step` and `published`.
    """
    run = {f"run.{key}": np.array(value, np.int64) for key, value in numbers.items()}
    arrays = {**optimizer, **run}
    save_arrays(path, {**arrays, CHECKSUM: checksum(arrays)})


def check_state(path: Path) -> Path:
    """The path of a state.

    Raises:
        UserError: there is no such file.
    """
    if not path.is_file():
        raise UserError(f"--resume {path}: no such file; expected {STATE} of an earlier run; check the path, or leave "
                        "out --resume to start anew")
    return path


def read_state(path: Path, identity: dict) -> tuple:
    """Read a state that fits.

    Args:
        path: of the file.
        identity: name -> integer, the settings of the run that is to go on.

    Returns:
        What `AdamW.load_state` takes, the step, and the steps whose files are kept.

    Raises:
        UserError: it is damaged, no state, or of other settings.
    """
    check_state(path)
    with open_checkpoint(path) as file:
        arrays = {name: file.read(name) for name in file.tensors}
    # States of before there were checksums have none.
    if CHECKSUM in arrays and not np.array_equal(arrays[CHECKSUM], checksum(arrays)):
        raise _damaged(path, "its content does not fit its checksum")
    try:
        found = {key: _integer(arrays, f"run.{key}") for key in identity}
        step, published = _integer(arrays, "run.step"), arrays["run.published"]
        _check_numbers(arrays, step, published)
    except KeyError as error:
        raise CheckpointError(f"--resume {path}: holds no {error}, expected {STATE} of an earlier run; name that file"
                              ) from None
    except ValueError as error:
        raise _damaged(path, str(error)) from None
    differing = [_difference(key, value, identity[key]) for key, value in found.items() if value != identity[key]]
    if differing:
        raise UserError(f"--resume {path}: was trained with {', '.join(differing)}; give the same, or start anew in "
                        "another folder")
    return arrays, step, published.tolist()


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"--resume {path}: is damaged, {why}; go on from a copy of it, or start anew in another "
                           "folder")


def _integer(arrays: dict, name: str) -> int:
    array = arrays[name]
    if array.shape != () or array.dtype.kind not in "iu":
        raise ValueError(f"`{name}` is {array.dtype.name} of shape {array.shape}, expected one integer")
    return int(array)


def _check_numbers(arrays: dict, step: int, published: np.ndarray) -> None:
    """Whether all values are such as a training can reach.

    Raises:
        KeyError: an array is missing.
        ValueError: one is not.
    """
    updates = float(arrays["updates"].reshape(-1)[0]) if arrays["updates"].size == 1 else -1.0
    if not 0 <= updates <= step <= MAX_STEP:
        raise ValueError(f"it counts {updates:g} updates in {step} steps")
    if published.ndim != 1 or published.dtype.kind not in "iu" or np.any((published < 0) | (published > step)):
        raise ValueError(f"`run.published` is {published.dtype.name} of shape {published.shape}, expected steps up to "
                         f"{step}")
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"`{name}` has values that are not finite")
        if name.startswith("square.") and array.size and array.min() < 0:
            raise ValueError(f"`{name}` has values below 0, which no square is")


def _difference(key: str, then: int, now: int) -> str:
    if key == "buckets":
        then, now = bool(then), bool(now)
    return f"{DESCRIPTIONS.get(key, f'--{key} {{}}').format(then)} (now {now})"
