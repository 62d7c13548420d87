"""tools/benchmark.py: every unit of work really does it, figures follow from what workers say, mistakes are told."""
from __future__ import annotations

import io
import json
import os
import runpy
import subprocess
import sys

import numpy as np
import pytest

from ip_adapter.benchmark import report as benchmark_rows
from ip_adapter.benchmark.report import Side, plot
from ip_adapter.benchmark.settings import SETTINGS, TASKS, setting_of
from ip_adapter.benchmark.tasks import prepare
from ip_adapter.config import InferenceConfig, ModelConfig
from tests.support.scripts import ROOT, shell

main = runpy.run_path(str(ROOT / "tools" / "benchmark.py"))


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_every_task_runs(task, merged_control):
    works(task, merged_control, InferenceConfig())


@pytest.mark.slow
@pytest.mark.parametrize("task", ["unet_step", "controlnet", "train_uncached"])
def test_and_of_the_other_family_what_differs(task, merged_xl):
    works(task, merged_xl, InferenceConfig(model=ModelConfig(num_heads=-1, num_head_channels=32)))


def works(task, weights, config):
    setting = setting_of(task, "1.5", batch_size=1, height=64, width=64, steps=2)
    loaded, work = prepare(setting, weights, config, "float32")
    seconds, stepping = work()
    assert 0 < stepping <= seconds
    assert task in ("command", "merge", "read") or loaded > 0


def test_a_command_has_the_configuration_of_the_benchmark(tmp_path, monkeypatch, capsys):
    called, config = [], tmp_path / "mine.yaml"
    config.write_text("sampling: {scale: 3.0}\n")
    monkeypatch.setattr(subprocess, "run", lambda words, **_: called.append(words))
    monkeypatch.setattr(sys, "stdin", io.StringIO("once\n"))
    main["main"](["--worker", "--version", "demo", "--task", "command", "--weights", str(config), "--config",
                  str(config)])
    words, = called
    assert words[words.index("--config") + 1] == str(config)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["seconds"] >= 0


def test_other_work_than_the_documents_has_none_of_its_figures():
    assert setting_of("image_variation", "1.5", batch_size=4).images_per_second == 0.36
    other = setting_of("image_variation", "1.5", batch_size=4, width=768)
    assert (other.width, other.height, other.images_per_second, other.steps_per_second) == (768, 512, None, None)
    assert {(s.task, s.version) for s in SETTINGS if s.images_per_second} == {
        ("train", "1.5"), ("image_variation", "1.5"), ("image_to_image", "1.5"), ("inpainting", "1.5"),
        ("controlnet", "1.5"), ("train", "xl"), ("image_variation", "xl"), ("controlnet", "xl")}


def test_the_tool_prints_a_table_and_writes_json(tmp_path):
    done = shell("python", ROOT / "tools/benchmark.py", "--version", "demo", "--task", "unet_step", "--task", "load",
                 "--H", "64", "--W", "64", "--batch_size", "1", "--steps", "2", "--repeat", "1", "--ms_mode", "1",
                 "--json", "speed.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    step, load = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["unet_step", "load"]
    assert len(step["seconds"]) == 2 and step["seconds_per_step"] == pytest.approx(step["seconds"][1] / 2)
    assert step["images_per_second"] == pytest.approx(2 / step["seconds"][1])
    assert load["seconds_per_step"] is None and load["load_seconds"] > 0
    assert step["peak_memory_bytes"] > 100e6
    assert step["ascend_910"] == {"steps_per_second": None, "images_per_second": None}


def test_operators_of_a_row(tmp_path):
    """Those of a UNet, the longest first, and what is left between them."""
    done = shell("python", ROOT / "tools/benchmark.py", "--version", "demo", "--task", "unet_step", "--H", "64", "--W",
                 "64", "--batch_size", "1", "--repeat", "1", "--ms_mode", "1", "--operators", "3", "--json",
                 "speed.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    row, = json.loads((tmp_path / "speed.json").read_text())["rows"]
    *operators, (rest, count, between) = row["operators"]
    assert {"MatMul", "Softmax", "Im2Col"} <= {name for name, times, spent in operators if times > 30 and spent > 0}
    assert sorted(operators, key=lambda operator: -operator[2]) == operators
    assert (rest, count) == ("between operators", None) and between > 0
    table, *lines = done.stdout.splitlines()
    assert table.split()[0] == "unet_step" and len(lines) == 4
    assert lines[0].split()[:2] == [operators[0][0], str(operators[0][1])] and lines[-1].endswith("%")


@pytest.mark.parametrize("apart", [True, False])
def test_the_other_side_takes_turns_or_waits_for_our_end(tmp_path, apart):
    """A stand-in for torch's Python says how many of our workers live while it works, as its seconds.

    It holds 9 TB, which no machine has beside ours, or next to nothing.
    """
    torch_python = tmp_path / "python"
    torch_python.write_text("#!/bin/sh\necho '{\"load_seconds\": 1}'\nwhile read line; do n=$(pgrep -fc -- "
                            f"'--worker.*{tmp_path}'); echo '{{\"seconds\": '$n.5', \"stepping\": 2, "
                            f"\"peak_memory_bytes\": {9 * 10**12 if apart else 9}}}'; done\n")
    torch_python.chmod(0o755)
    done = shell("python", ROOT / "tools/benchmark.py", "--version", "demo", "--task", "unet_step", "--H", "64", "--W",
                 "64", "--batch_size", "1", "--repeat", "1", "--ms_mode", "1", "--against", "diffusers", "--standins",
                 tmp_path / "standins", "--torch_python", torch_python, "--json", "speed.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    row, = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert row["diffusers"]["seconds"] == ([0.5, 0.5] if apart else [1.5, 1.5])
    assert row["ratio"] == pytest.approx(row["seconds"][1] / 2)
    assert ("one after the other" in done.stderr) == apart


def test_a_plot_of_rows(tmp_path):
    """More seconds and memory lie higher; the first time, which compiles, is left out."""
    other = {"seconds": [1.0, 1.0, 1.0], "peak_memory_bytes": 2**30}
    rows = [{"task": "unet_step", "batch_size": n, "height": 64, "seconds": [99.0, n, n],
             "peak_memory_bytes": n * 2**30, "diffusers": other} for n in (1, 2, 4)]
    drawn = np.asarray(plot(rows, "batch_size"))
    assert drawn.shape == (640, 640, 3)
    for half in drawn[28:320], drawn[348:]:
        lowest = {}
        for colour in ((30, 80, 200), (220, 120, 0)):
            found = np.argwhere((half == colour).all(-1))
            lowest[colour] = found[found[:, 1] > 600][:, 0].min()
        assert lowest[30, 80, 200] < 10 and lowest[220, 120, 0] > 150


def test_mistakes(tmp_path, outcome):
    def said(*words):
        return outcome(main["main"], *words)
    status, line = said("--weights", ROOT / "assets" / "sd_demo.safetensors", "--against", "diffusers")
    assert status == 2 and "leave out --weights" in line
    status, line = said("--version", "xl", "--task", "inpainting")
    assert status == 2 and "--task inpainting is not there for --version xl, expected one of train, " in line
    weights = ROOT / "assets" / "sd_demo.safetensors"
    for words, expected in ((["--json", tmp_path], f"--json: {tmp_path}: is a folder"),
                            (["--json", weights, "--weights", weights], "is the file of --weights, which is read"),
                            (["--sweep", "steps=1", "--plot", tmp_path / "a.txt"], "expected a name that ends in .png"),
                            (["--sweep", "steps=1", "--plot", tmp_path / "a.png", "--json", tmp_path / "a.png"],
                             "is the file of --json; name another file")):
        status, line = said("--version", "demo", "--task", "unet_step", *words)
        assert status == 2 and expected in line, line
    status, line = said("--version", "demo", "--task", "train", "--deep_every", 2)
    assert status == 2 and "--task train has nothing that deep_every leaves out; it shortens image_variation" in line
    status, line = said("--version", "demo", "--against", "diffusers", "--sweep", "guidance_end=1,0.5")
    assert status == 2 and "leave out guidance_end" in line
    status, line = said("--version", "demo", "--operators", 3, "--task", "unet_step", "--task", "merge")
    assert status == 2 and "leave out --task merge" in line
    status, line = said("--version", "demo", "--plot", tmp_path / "plot.png")
    assert status == 2 and "give --sweep" in line
    for wrong in ("width=1", "steps", "size=30", "steps=0", "guidance_end=2"):
        status, line = said("--version", "demo", "--sweep", wrong)
        assert status == 2 and "--sweep" in line, wrong
    status, line = said("--torch_python", tmp_path / "none")
    assert status == 2 and "no such file" in line
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(b"no checkpoint")
    status, line = said("--task", "load", "--version", "demo", "--weights", broken)
    assert status == 2 and "ended with status 2 before it answered" in line


def test_the_other_side_has_the_threads_the_user_gave(monkeypatch):
    """Not the one to which MindSpore, imported here, limits whatever this process starts."""
    for given in (None, "3"):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if given:
            monkeypatch.setenv("OMP_NUM_THREADS", given)
        code = "import json, os; print(json.dumps({'load_seconds': os.environ.get('OMP_NUM_THREADS')}))"
        with Side([sys.executable, "-c", code]) as side:
            assert side.start["load_seconds"] == given


def test_turns_are_taken_and_medians_compared(tmp_path):
    """Two stand-ins for workers that say how long they took: the first time is compiling, the rest count."""
    def side(name, *seconds):
        script = tmp_path / f"{name}.py"
        replies = [json.dumps({"seconds": s, "stepping": s / 2, "peak_memory_bytes": 7}) for s in seconds]
        script.write_text("import sys\nprint('chatter')\nprint('{\"load_seconds\": 5}', flush=True)\n"
                          f"for reply in {replies!r}:\n    sys.stdin.readline()\n    print(reply, flush=True)\n")
        with Side([sys.executable, script]) as made:
            for _ in seconds:
                made.work()
        return made.figures(steps=2, images=4)
    ours = side("ours", 9.0, 2.0, 4.0, 3.0)
    assert ours["seconds_per_step"] == pytest.approx(0.75) and ours["images_per_second"] == pytest.approx(4 / 3)
    assert ours["compile_seconds"] == pytest.approx(6.0) and ours["load_seconds"] == 5


def test_a_full_disk_keeps_the_old_figures(tmp_path, outcome, monkeypatch):
    """The figures of a former run are there until the new ones are whole; a missing folder is made."""
    figures = {"task": "load", "seconds": [1.0]}
    monkeypatch.setitem(main["main"].__globals__, "measure", lambda *_: figures)
    monkeypatch.setattr(benchmark_rows, "table_line", lambda *_: "")
    monkeypatch.setattr(benchmark_rows, "operator_lines", lambda *_: [])
    speed = tmp_path / "new" / "speed.json"
    words = ["--version", "demo", "--task", "load", "--json", speed]
    assert outcome(main["main"], *words)[0] == 0
    assert json.loads(speed.read_text()) == {"rows": [figures]}

    def fail(_):
        raise OSError(28, "No space left on device", str(speed))
    monkeypatch.setattr(os, "fsync", fail)
    figures["seconds"] = [2.0]
    status, line = outcome(main["main"], *words)
    assert status == 2 and "speed.json: No space left on device" in line
    assert json.loads(speed.read_text())["rows"][0]["seconds"] == [1.0] and list(speed.parent.iterdir()) == [speed]
