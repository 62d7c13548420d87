"""Running scripts, here or in a process of their own, and what they must say."""
from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Iterator

import numpy as np

from tests.support.arrays import DATA, pictures

ROOT = Path(__file__).resolve().parents[2]
MPI_FLAGS = ["--allow-run-as-root", "--oversubscribe"]


def shell(*words, cwd) -> subprocess.CompletedProcess:
    """Run a command in a process of its own, with this Python and the mpirun beside it; also as root, on few cores."""
    here = {"python": [sys.executable], "mpirun": [Path(sys.executable).parent / "mpirun", *MPI_FLAGS]}
    with every_core() if "mpirun" in words else nullcontext():
        words = [str(part) for word in words for part in here.get(word, [word])]
        return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=600)


@contextmanager
def every_core() -> Iterator[None]:
    """Jobs of several processes that are started here may use all cores, not only that of the test."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count()))
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)


def narrow_xl(name: str, path: Path) -> Path:
    """Write a configuration of SDXL for the stand-ins, whose heads are narrower; `name` is below configs/."""
    path.write_text((ROOT / "configs" / name).read_text().replace("num_head_channels: 64", "num_head_channels: 32"))
    return path


def assert_adapter_is_used(outcome, main, words: list, checkpoints: tuple, adapter: Path, folder: Path) -> None:
    """A finetuned adapter makes one picture, merged or given in either format, and another than before.

    Args:
        outcome: the fixture.
        main: of an inference script.
        words: flags of one small picture.
        checkpoints: merged with the adapter, and with the one before.
        adapter: its .ckpt, beside which is its .safetensors.
        folder: to write into.
    """
    full, before = checkpoints
    for checkpoint, flags in ((full, []), (before, ["--ip_adapter", adapter]),
                              (before, ["--ip_adapter", adapter.with_suffix(".safetensors")]), (before, [])):
        status, said = outcome(main, *words, "--ckpt_path", checkpoint, *flags, "--img", DATA / "input.png",
                               "--H", "64", "--W", "64", "--sampling_steps", "2", "--n_samples", "1",
                               "--output_path", folder)
        assert status == 0, said
    one, two, three, untrained = pictures(folder)
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one, three)
    assert not np.array_equal(one, untrained)


def log_of(folder) -> list:
    """The rows of a training's log."""
    with open(folder / "log.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def overridden(words: list, flags: list) -> list:
    """The words of a command line with these flags in place of those of the same name."""
    kept, dropping = [], False
    for word in words:
        if str(word).startswith("--"):
            dropping = word in flags
        if not dropping:
            kept.append(word)
    return [*kept, *flags]


def assert_mistakes(outcome, main, words: list, cases: dict, folder: Path) -> None:
    """Each case is answered with one line and status 2, and leaves nothing behind.

    Args:
        outcome: the fixture.
        main: the script's.
        words: flags that would work.
        cases: name -> (flags that spoil them, pattern of the line).
        folder: where the cases' files are.
    """
    failed, out = [], folder.parent / "out"
    for name, (flags, expected) in cases.items():
        before = set(folder.iterdir())
        status, said = outcome(main, *overridden([*words, "--output_path", out], flags))
        line = said.strip().splitlines()[-1] if said.strip() else ""
        if status != 2 or not re.search(expected, line) or "Traceback" in said:
            failed.append(f"{name}: status {status}, said {said!r}")
        if set(folder.iterdir()) != before or out.exists():
            failed.append(f"{name}: left something behind")
    assert not failed, "\n".join(failed)
