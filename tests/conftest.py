"""Fixtures: small stand-in files, the checkpoint merged from them, and scripts run in this process or another."""
from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Iterator

import numpy as np
import pytest
from PIL import Image

from ldm.parallel import prepare_process

prepare_process()  # before MindSpore is imported

from mindspore import Tensor  # noqa: E402

from ip_adapter.drawn_world import caption, draw, random_scene  # noqa: E402
from ip_adapter.families import SD15, SDXL, Family  # noqa: E402
from ip_adapter.merge import merge  # noqa: E402
from ip_adapter.parts import ModelSizes  # noqa: E402
from ip_adapter.script import execute  # noqa: E402
from ip_adapter.standins import MINIATURE, MINIATURE_XL, write_standins  # noqa: E402
from ldm.checkpoint_file import open_checkpoint  # noqa: E402
from ldm.device import start_device  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(__file__).resolve().parent / "data"
MPI_FLAGS = ["--allow-run-as-root", "--oversubscribe"]

RNG = np.random.default_rng(0)


def shallow(sizes: ModelSizes) -> ModelSizes:
    """The same with half of the blocks, for what scripts do with networks; numbers were recorded with all of them."""
    unet = replace(sizes.unet, channel_mult=(1, 2), transformer_depth=(0, 1), middle_depth=1)
    return replace(sizes, unet=unet, vae=replace(sizes.vae, num_res_blocks=1))


SHALLOW, SHALLOW_XL = shallow(MINIATURE), shallow(MINIATURE_XL)

# Tests side by side (-n 2) share the cores out: networks this small take twice as long on threads that wait for cores.
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    cores, number = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    own = cores[number::int(os.environ["PYTEST_XDIST_WORKER_COUNT"])] or [cores[number % len(cores)]]
    os.sched_setaffinity(0, own)

start_device("CPU", 1)


@pytest.fixture(autouse=True)
def operator_by_operator():
    """A test finds PyNative, also after one that ran a training, which leaves graph mode."""
    start_device("CPU", 1)


@pytest.fixture(scope="session", autouse=True)
def cache_of_these_tests(tmp_path_factory):
    """The user's cache, of compiled graphs and fingerprints, is neither used nor added to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def merged_file(folder: Path, standins: dict, family: Family = SD15) -> Path:
    """The checkpoint that stand-ins are merged into, under its usual name."""
    path = folder / {"SD-1.5": "sd_v1.5_ip_adapter.ckpt", "SDXL": "sd_xl_base_1.0_ms_ip_adapter.ckpt"}[family.name]
    merge(family, **standins, out=path)
    return path


@pytest.fixture(scope="session")
def standins(tmp_path_factory) -> dict:
    """The published files of SD-1.5, small and shallow, by the merge tool's flags."""
    return write_standins(tmp_path_factory.mktemp("standins"), SHALLOW)


@pytest.fixture(scope="session")
def merged(standins, tmp_path_factory) -> Path:
    """The merged checkpoint of the stand-ins, without a ControlNet."""
    return merged_file(tmp_path_factory.mktemp("merged"), {**standins, "controlnet": None})


@pytest.fixture(scope="session")
def merged_control(standins, tmp_path_factory) -> Path:
    """The merged checkpoint of the stand-ins, with a ControlNet."""
    return merged_file(tmp_path_factory.mktemp("merged"), standins)


@pytest.fixture(scope="session")
def standins_xl(tmp_path_factory) -> dict:
    """The published files of SDXL, small and shallow, by the merge tool's flags."""
    return write_standins(tmp_path_factory.mktemp("standins_xl"), SHALLOW_XL, family=SDXL)


@pytest.fixture(scope="session")
def merged_xl(standins_xl, tmp_path_factory) -> Path:
    """The merged checkpoint of SDXL's stand-ins, with a ControlNet."""
    return merged_file(tmp_path_factory.mktemp("merged"), standins_xl, SDXL)


@pytest.fixture(scope="session")
def standins_recorded(tmp_path_factory) -> dict:
    """The stand-ins of SD-1.5 that numbers were recorded with."""
    return write_standins(tmp_path_factory.mktemp("standins_recorded"))


@pytest.fixture(scope="session")
def recorded(standins_recorded, tmp_path_factory) -> Path:
    """What those are merged into, with a ControlNet."""
    return merged_file(tmp_path_factory.mktemp("recorded"), standins_recorded)


@pytest.fixture(scope="session")
def recorded_xl(tmp_path_factory) -> Path:
    """The same of SDXL."""
    standins = write_standins(tmp_path_factory.mktemp("standins_recorded"), MINIATURE_XL, family=SDXL)
    return merged_file(tmp_path_factory.mktemp("recorded"), standins, SDXL)


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A small data set of drawings with captions; a row in ten has no picture."""
    folder = tmp_path_factory.mktemp("world")
    with open(folder / "img_txt.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["dir", "text"])
        for n in range(10):
            scene = random_scene(np.random.default_rng([0, n]))
            if n != 7:
                draw(scene, 64).save(folder / f"{n}.png")
            writer.writerow([f"{n}.png", caption(scene)])
    return folder


@pytest.fixture
def picture(tmp_path) -> Path:
    """A small picture whose halves differ."""
    pixels = np.zeros((60, 80, 3), np.uint8)
    pixels[:, :40] = (200, 40, 30)
    path = tmp_path / "picture.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def outcome(capfd):
    """Run a script's `main` here as the shell would: returns exit status and standard error."""
    def call(main, *argv):
        status = 0
        try:
            execute(lambda: main([str(word) for word in argv]))
        except SystemExit as leave:
            status = leave.code or 0
        return status, capfd.readouterr().err
    return call


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


def arrays(path) -> dict:
    """All tensors of a checkpoint file."""
    with open_checkpoint(path) as file:
        return {name: file.read(name) for name in file.tensors}


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


def assert_equal(a: dict, b: dict) -> None:
    """The same names, and under each the same array."""
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def log_of(folder) -> list:
    """The rows of a training's log."""
    with open(folder / "log.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


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


def write_csv(folder, text: str, name: str = "img_txt.csv"):
    (folder / name).write_bytes(text.encode())
    return folder


@pytest.fixture
def six(tmp_path):
    """Six pictures of 40 x 30 of one grey each, and captions; the third and fourth cannot be read."""
    for i in range(6):
        Image.new("RGB", (40, 30), (40 * i,) * 3).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").unlink()
    (tmp_path / "3.png").write_bytes(b"not a picture")
    return write_csv(tmp_path, "dir,text\n" + "".join(f"{i}.png,picture {i}\n" for i in range(6)))


def normal(*shape) -> np.ndarray:
    """Standard normal float32 numbers, the next of one stream."""
    return RNG.standard_normal(shape).astype(np.float32)


def fill(cell) -> None:
    """Random values for all parameters, so that no bias or gain is trivial."""
    for _, parameter in cell.parameters_and_names():
        parameter.set_data(Tensor(normal(*parameter.shape), parameter.dtype))
