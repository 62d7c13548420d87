"""Every long-running script and tool, ended at a random moment by Ctrl-C, SIGTERM or SIGKILL, and started once more.

`KILLS=20 pytest tests/test_kills.py` ends each of them twenty times by each signal, at other moments each time.
"""
from __future__ import annotations

import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from ip_adapter.weights.dummy import write_clip_standin
from tests.support.arrays import DATA, arrays
from tests.support.scripts import MPI_FLAGS, ROOT, narrow_xl

pytestmark = pytest.mark.slow

TRAIN = ("--data_path {world} --image_size 64 --train_batch_size 2 --ms_mode 1 --cpu_threads 1 --max_steps 4 "
         "--ckpt_save_interval 1 --output_path {out}/run")
TRAIN_SD = f"train_sd.py --pretrained_model_path {{merged}} --version demo {TRAIN}"
MAKE = "--n_samples 2 --H 64 --W 64 --sampling_steps 2 --output_path {out}/made"
MAKE_SD = f"--ckpt_path {{merged}} {MAKE}"
MAKE_XL = f"--weight {{merged_xl}} --config {{out}}/small.yaml {MAKE}"
MPIRUN = "mpirun -n 2 python "

# What is started -> the seconds it usually takes on two cores, and its command.
COMMANDS = {
    "image_variation_sd": (6, f"image_variation_sd.py --img {{image}} {MAKE_SD}"),
    "image_to_image_sd": (6, f"image_to_image_sd.py --img {{image}} --ref_img {{image}} {MAKE_SD}"),
    "image_inpainting_sd": (6, f"image_inpainting_sd.py --img {{image}} --ref_img {{image}} --ref_mask {{mask}} "
                               f"{MAKE_SD}"),
    "controlnet_sd": (6, f"controlnet_sd.py --img {{image}} --control_image {{hint}} {MAKE_SD}"),
    "image_variation_sdxl": (6, f"image_variation_sdxl.py --img {{image}} {MAKE_XL}"),
    "controlnet_sdxl": (6, f"controlnet_sdxl.py --img {{image}} --control_image {{hint}} {MAKE_XL}"),
    "kept graphs": (25, f"image_variation_sd.py --img {{image}} {MAKE_SD} --ms_mode 0 --graph_cache {{out}}/graphs"),
    "merge": (4, "tools/merge_ckpts_sd.py --sd {base} --open_clip_vit {open_clip_vit} --ip_adapter {ip_adapter} "
                 "--vae {vae} --controlnet {controlnet} --out {out}/new/merged.ckpt"),
    "merge SDXL": (4, "tools/merge_ckpts_sdxl.py --sd_xl_base {merged_xl} --open_clip_vit {merged_xl} --ip_adapter "
                      "{ip_adapter_xl} --controlnet {controlnet_xl} --out {out}/merged.safetensors"),
    "convert": (4, "tools/convert_checkpoint.py --source {base} --out {out}/base.ckpt"),
    "features": (7, f"{TRAIN_SD} --cache_dir {{out}}/cache"),
    "training": (6, TRAIN_SD),
    "training SDXL": (7, f"train_sdxl.py --weight {{merged_xl}} --config {{out}}/training.yaml {TRAIN}"),
    "validation": (6, f"{TRAIN_SD} --validation_interval 1 --validation_count 1 --validation_steps 2 --max_steps 2"),
    "mpirun": (12, f"{MPIRUN}{TRAIN_SD} --is_parallel True"),
    "mpirun, features": (12, f"{MPIRUN}{TRAIN_SD} --is_parallel True --cache_dir {{out}}/cache"),
    "train_demo": (7, f"tools/train_demo.py --part vae {TRAIN}".replace("64", "32").replace("world", "drawings")),
    "evaluate": (6, "tools/evaluate.py --images {world} --weights {merged} --clip {clip} --out {out}/scores --size 64 "
                    "--sampling_steps 2 --variations 2 --count 2 --ms_mode 1"),
    "evaluate_demo": (10, "tools/evaluate_demo.py --out {out}/judged --count 2 --variations 1 --steps 2 --ms_mode 1"),
    "benchmark": (8, "tools/benchmark.py --version demo --task unet_step --H 64 --W 64 --batch_size 1 "
                      "--steps 2 --repeat 1 --ms_mode 1 --json {out}/speed.json"),
    "prepare_coco": (0.5, "tools/prepare_coco.py --label {label} --image {world} --out {out}/img_txt.csv"),
    "draw_world": (2, "tools/draw_world.py --out {out}/drawn --count 300 --size 64"),
}
# What a run of all tests does: each part of the program once, by one signal.
FEW = [("controlnet_sdxl", signal.SIGTERM), ("merge", signal.SIGINT),
       ("convert", signal.SIGKILL), ("features", signal.SIGKILL), ("validation", signal.SIGTERM),
       ("mpirun", signal.SIGKILL), ("evaluate", signal.SIGINT), ("benchmark", signal.SIGTERM),
       ("prepare_coco", signal.SIGTERM), ("draw_world", signal.SIGINT)]
CHOSEN = [(turn, name, number) for turn in range(1, int(os.environ.get("KILLS", 0)) + 1) for name in COMMANDS
          for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)] or [(0, *few) for few in FEW]


@pytest.fixture(scope="module")
def inputs(standins, standins_xl, merged_control, merged_xl, world, tmp_path_factory) -> dict:
    """What commands read, by the names they have in COMMANDS."""
    folder = tmp_path_factory.mktemp("inputs")
    write_clip_standin(folder / "clip.safetensors")
    (folder / "label.json").write_text(json.dumps({
        "images": [{"id": n, "file_name": f"{n}.png"} for n in range(6)],
        "annotations": [{"image_id": n % 6, "caption": f"number {n}"} for n in range(100_000)]}))
    drawings = shutil.copytree(world, folder / "drawings")
    shutil.copy(world / "6.png", drawings / "7.png")  # which is missing there
    return {**standins, "merged": merged_control, "merged_xl": merged_xl,
            "controlnet_xl": standins_xl["controlnet"], "ip_adapter_xl": standins_xl["ip_adapter"],
            "world": world, "drawings": drawings,
            "clip": folder / "clip.safetensors", "label": folder / "label.json", "image": DATA / "input.png",
            "mask": DATA / "mask.png", "hint": DATA / "hint.png"}


@pytest.mark.parametrize("turn, name, number", CHOSEN)
def test_ended_at_any_moment(turn, name, number, inputs, tmp_path):
    """One line and its status, whole files, nothing running; the same command then succeeds."""
    usual, command = COMMANDS[name]
    narrow_xl("inference/sd_xl_base.yaml", tmp_path / "small.yaml")
    narrow_xl("training/sd_xl_base_finetune_910b.yaml", tmp_path / "training.yaml")
    words = command.format(**inputs, out=tmp_path).split()
    moment = random.Random(f"{turn} {name} {number}").uniform(0, usual)
    status, said = ended(words, tmp_path, number, moment)
    note = f"{number!r} after {moment:.2f} s: status {status}, said {said}"
    assert not running(tmp_path), note
    if status != 0:  # otherwise it was done before
        assert_ended(words[0], number, status, said, note)
    assert_whole(tmp_path, status == 0 or number != signal.SIGKILL, note)
    if "draw_world" in name and (tmp_path / "drawn").exists():
        shutil.rmtree(tmp_path / "drawn")  # whole; it does not take the place of what is there
    if list(tmp_path.glob("run/ckpt/train_resume.ckpt")) + list(tmp_path.glob("run/weights/train_resume.ckpt")):
        words += ["--resume", "True"]
    again = subprocess.run(in_shell(words), **surroundings(tmp_path), timeout=300)
    assert again.returncode == 0 and "Traceback" not in again.stderr, f"{note}; then {again.stderr}"
    assert_whole(tmp_path, False, note)


def assert_ended(program: str, number: int, status: int, said: str, note: str) -> None:
    """By the signal, with one line of each process that heard it; mpirun has its own words and statuses."""
    assert "Traceback" not in said, note
    if number == signal.SIGKILL:
        assert status == -number, note
        return
    if program == "mpirun":
        assert status in (128 + number, 1, -number), note
        return
    word = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[number]
    assert status == 128 + number, note
    assert re.search(rf"(^|\n){Path(program).name}: {word}; [^\n]*\n\Z", said) and said.count(f": {word};") == 1, note


def ended(words: list, folder: Path, number: int, moment: float) -> tuple:
    """Start a command and send it a signal some seconds after it can hear one; returns its status and what it said."""
    process = subprocess.Popen(in_shell(words), start_new_session=True, **surroundings(folder))
    try:
        while process.poll() is None and not hears(process.pid, "SigCgt" if words[0] == "mpirun" else "SigBlk"):
            time.sleep(0.01)
        time.sleep(moment)
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
    finally:
        for pid in running(folder) if process.poll() is None else ():
            os.kill(pid, signal.SIGKILL)
    deadline = time.time() + 30
    while running(folder) and time.time() < deadline:
        time.sleep(0.1)
    return process.returncode, said


def in_shell(words: list) -> list:
    here = {"python": sys.executable, "mpirun": str(Path(sys.executable).parent / "mpirun")}
    if words[0] != "mpirun":
        return [sys.executable, *words]
    return [here["mpirun"], *MPI_FLAGS, *(here.get(word, word) for word in words[1:])]


def surroundings(folder: Path) -> dict:
    """Arguments of subprocess: all that is written besides the output is written into the folder too."""
    (folder / "tmp").mkdir(exist_ok=True)
    env = {**os.environ, "TMPDIR": str(folder / "tmp"), "XDG_CACHE_HOME": str(folder / "user_cache")}
    return {"cwd": ROOT, "env": env, "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE,
            "text": True}


def hears(pid: int, mask: str) -> bool:
    """Whether a process has taken over SIGINT: a script blocks it for all threads but one, mpirun catches it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    return bool(int(re.search(rf"{mask}:\s*(\w+)", status)[1], 16) >> (signal.SIGINT - 1) & 1)


def running(folder: Path) -> list:
    """Processes whose environment names the folder: all that a command has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"TMPDIR={folder}/tmp\0".encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            pass
    return found


def assert_whole(folder: Path, tidy: bool, note: str) -> None:
    """Every file can be read to its end; with `tidy` there is nothing unfinished beside them."""
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        if any(part.startswith(".") for part in parts) or parts[0] == "tmp" != parts[-1]:
            assert not tidy or "prte" in str(path), f"{path} is left; {note}"
        elif path.suffix in (".ckpt", ".safetensors"):
            assert arrays(path), note
        elif path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".csv":
            with open(path, newline="", encoding="utf-8") as file:
                assert len({len(row) for row in csv.reader(file)}) == 1, f"{path}; {note}"
