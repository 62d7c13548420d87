"""Training in several processes, for real: mpirun and msrun on the CPU."""
from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ip_adapter.demo.scenes import draw, random_scene
from tests.support.arrays import arrays
from tests.support.scripts import MPI_FLAGS, ROOT, every_core, log_of, narrow_xl
from tests.support.training import parameters

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
MPIRUN = [BIN / "mpirun", *MPI_FLAGS, "-n", "2", sys.executable]


@pytest.fixture(scope="module")
def words(merged, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rows = ["dir,text"]
    for n in range(8):
        draw(random_scene(np.random.default_rng(n)), 64).save(folder / f"{n}.png")
        rows.append(f"{n}.png,a shape")
    (folder / "img_txt.csv").write_text("\n".join(rows) + "\n")
    return ["--data_path", folder, "--pretrained_model_path", merged, "--version", "demo", "--image_size", "64",
            "--ms_mode", "1", "--cpu_threads", "1"]


@pytest.fixture
def words_xl(merged_xl, tmp_path):
    """Pictures of two proportions, in buckets."""
    config, rows = narrow_xl("training/sd_xl_base_finetune_910b.yaml", tmp_path / "small.yaml"), ["dir,text"]
    for n in range(8):
        picture = draw(random_scene(np.random.default_rng(n)), 64)
        picture.resize((64, 32) if n % 2 else (32, 64)).save(tmp_path / f"{n}.png")
        rows.append(f"{n}.png,a shape")
    (tmp_path / "img_txt.csv").write_text("\n".join(rows) + "\n")
    return ["--data_path", tmp_path, "--weight", merged_xl, "--config", config, "--image_size", "64", "--buckets",
            "True", "--ms_mode", "1", "--cpu_threads", "1"]


def start(*words) -> subprocess.Popen:
    """In a session of its own, so that nothing of the job can outlive the test."""
    with every_core():
        return subprocess.Popen([str(word) for word in words], cwd=ROOT, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(process: subprocess.Popen, seconds: int = 600) -> tuple:
    try:
        out, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out + said


@pytest.mark.parametrize("script, fixture, weights", [("train_sd.py", "words", "ckpt"),
                                                      ("train_sdxl.py", "words_xl", "weights")])
def test_two_processes_equal_one_with_twice_the_batch(script, fixture, weights, tmp_path, request):
    """Under mpirun, and cached features made by both at once; one process goes on where two have stopped."""
    words = request.getfixturevalue(fixture)
    steps = ["--max_steps", "4", "--ckpt_save_interval", "2", "--cache_dir", tmp_path / "cache"]
    one = finish(start(sys.executable, script, *words, *steps, "--train_batch_size", "4", "--output_path",
                       tmp_path / "one"))
    two = finish(start(*MPIRUN, script, *words, *steps, "--train_batch_size", "2", "--output_path",
                       tmp_path / "two", "--is_parallel", "True"))
    assert one[0] == two[0] == 0, one[1] + two[1]
    assert two[1].count("4 steps in") == 1  # rank 0 speaks for all
    a, b = (arrays(tmp_path / name / weights / "train_resume.ckpt") for name in ("one", "two"))
    for name in a.keys() - {"run.checksum"}:
        # AdamW divides by the gradient's size, so where that is near 0 rounding shows in full.
        kind, apart = name.split(".")[0], np.abs(a[name] - b[name])
        if kind in ("mean", "square"):
            assert apart.max() <= 2e-3 * np.abs(a[name]).max(), name
        elif kind in ("parameter", "average"):
            assert apart.mean() <= 1e-6 and apart.max() <= 1e-3, name
        else:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    for row, other in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two")):
        assert float(row["loss"]) == pytest.approx(float(other["loss"]), rel=1e-4)
    assert {path.name for path in (tmp_path / "two" / weights).iterdir()} == {
        path.name for path in (tmp_path / "one" / weights).iterdir()}
    status, said = finish(start(sys.executable, script, *words, *steps, "--train_batch_size", "4",
                                "--output_path", tmp_path / "two", "--max_steps", "5", "--resume", "True"))
    assert status == 0 and "going on after step 4 of 5" in said, said


def test_msrun(words, tmp_path):
    status, said = finish(start(
        BIN / "msrun", "--worker_num=2", "--local_worker_num=2", "--join=True", f"--log_dir={tmp_path / 'log'}",
        "train_sd.py", *words, "--max_steps", "2", "--output_path", tmp_path / "run", "--is_parallel", "True",
        "--train_batch_size", "2"))
    assert status == 0, said
    assert len(log_of(tmp_path / "run")) == 2


@pytest.mark.parametrize("who", ["rank 0", "rank 1", "Ctrl-C"])
def test_the_job_ends_at_once(words, tmp_path, who):
    """When a process is killed; or by Ctrl-C, when mpirun leaves no time to save. Nothing is left running."""
    job = start(*MPIRUN, "train_sd.py", *words, "--max_steps", "1000", "--output_path", tmp_path, "--is_parallel",
                "True", "--train_batch_size", "2", "--ckpt_save_interval", "2")
    deadline = time.time() + 300
    while time.time() < deadline and not (tmp_path / "ckpt" / "train_resume.ckpt").exists():
        time.sleep(0.2)
    ranks = [pid for pid in running(f"{sys.executable} train_sd.py.*{tmp_path}") if pid != job.pid]
    if who == "Ctrl-C":
        job.send_signal(signal.SIGINT)
    else:
        os.kill(ranks[int(who[-1])], signal.SIGKILL)
    begun = time.time()
    status, _ = finish(job, 60)
    while running(f"train_sd.py.*{tmp_path}") + running("communication.init") and time.time() - begun < 30:
        time.sleep(0.2)  # the kernel may still be taking them down
    assert len(ranks) == 2 and status != 0 and time.time() - begun < 30, (ranks, status, time.time() - begun)
    assert int(parameters(tmp_path)["run.step"]) >= 2


def running(pattern: str) -> list:
    """Process numbers by a pattern of the command line."""
    found = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True).stdout
    return sorted(int(pid) for pid in found.split())


def test_a_process_alone_is_told_how_to_start(words, tmp_path):
    status, said = finish(start(sys.executable, "train_sd.py", *words, "--output_path", tmp_path / "out",
                                "--is_parallel", "True"))
    assert status == 2 and "--is_parallel True: this process was started alone; start it as `mpirun -n 2" in said
    assert not (tmp_path / "out").exists()


def test_launchers_are_there():
    assert shutil.which("mpirun", path=str(BIN)) and shutil.which("msrun", path=str(BIN)), "see tests/requirements.txt"
