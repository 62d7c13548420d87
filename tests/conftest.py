"""Fixtures: small stand-in files, the checkpoint merged from them, and scripts run in this process or another."""
from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.parallel import prepare_process

prepare_process()  # before MindSpore is imported

from ip_adapter.cli.script import execute  # noqa: E402
from ip_adapter.demo.scenes import caption, draw, random_scene  # noqa: E402
from ip_adapter.families import SDXL  # noqa: E402
from ip_adapter.weights.dummy import MINIATURE_XL, write_standins  # noqa: E402
from ldm.device import start_device  # noqa: E402
from tests.support.dummies import SHALLOW, SHALLOW_XL, merged_file, write_csv  # noqa: E402

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


@pytest.fixture
def six(tmp_path):
    """Six pictures of 40 x 30 of one grey each, and captions; the third and fourth cannot be read."""
    for i in range(6):
        Image.new("RGB", (40, 30), (40 * i,) * 3).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").unlink()
    (tmp_path / "3.png").write_bytes(b"not a picture")
    return write_csv(tmp_path, "dir,text\n" + "".join(f"{i}.png,picture {i}\n" for i in range(6)))


