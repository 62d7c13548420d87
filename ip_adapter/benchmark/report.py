"""Rows of the benchmark: processes that do the work in turns, the figures they give, the table and the plot."""
from __future__ import annotations

import json
import os
import statistics
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image

from ip_adapter.images.charts import BLUE, ORANGE, Curve, chart
from ldm.errors import UserError
from ldm.parallel import tied_to_parent

COLUMNS = (("task", 16), ("version", 7), ("size", 9), ("batch", 5), ("step/s", 8), ("img/s", 8), ("load s", 7),
           ("compile s", 9), ("peak GiB", 8), ("910 step/s", 10), ("910 img/s", 9), ("diffusers", 9), ("ratio", 6))


class Side:
    """A process that does the work when told to, and ends with the `with` block it stands in.

    Args:
        words: of its command line.
        temporary: folder for its temporary files, which the caller removes: it is killed if the caller is stopped.
    """

    def __init__(self, words: list, temporary: Path | None = None):
        # Importing MindSpore sets OMP_NUM_THREADS=1 behind Python's back, and torch would inherit a single thread.
        # `os.environ` is what the user has set.
        self.process = subprocess.Popen([str(word) for word in words], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, preexec_fn=tied_to_parent(),
                                        env={**os.environ, **({"TMPDIR": str(temporary)} if temporary else {})})
        self.start, self.replies, self.operators = self.reply(), [], None

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_) -> None:
        self.process.stdin.close()
        self.process.wait()

    def reply(self) -> dict:
        """The next line of JSON; other lines are a library's talk."""
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise UserError(f"{self.process.args[1]} ended with status {self.process.wait()} before it answered; what it "
                        "said stands above")

    def ask(self, line: str) -> dict:
        """Send a line and wait for what is answered."""
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.reply()

    def work(self) -> None:
        """Do the work once."""
        self.replies.append(self.ask(""))

    def profile(self) -> None:
        """Do it under a profiler."""
        self.operators = self.ask("operators")["operators"]

    def figures(self, steps: int, images: int) -> dict:
        """Medians of all replies but the first, and what the first took longer."""
        first, *rest = self.replies
        rest = rest or [first]
        median = {key: statistics.median(reply[key] for reply in rest) for key in ("seconds", "stepping")}
        return {"seconds_per_step": median["stepping"] / steps, "steps_per_second": steps / median["stepping"],
                "images_per_second": images / median["seconds"], "load_seconds": self.start["load_seconds"],
                "compile_seconds": max(0.0, first["seconds"] - median["seconds"]),
                "peak_memory_bytes": self.replies[-1]["peak_memory_bytes"],
                "seconds": [reply["seconds"] for reply in self.replies]}


def table_line(row: dict, swept: str = "") -> str:
    """A row under COLUMNS: speeds here and on Ascend 910; diffusers' seconds a step, and ours as a multiple of them.

    Args:
        row: its figures.
        swept: what is varied, and its value, behind the row.
    """
    ascend, other = row["ascend_910"], row.get("diffusers")
    before = row["seconds"][0] if row["task"] == "merge" else row["load_seconds"]
    cells = (row["task"], row["version"], f"{row['height']}x{row['width']}", str(row["batch_size"]),
             row["steps_per_second"], row["images_per_second"], before, row["compile_seconds"],
             row["peak_memory_bytes"] / 2**30, ascend["steps_per_second"], ascend["images_per_second"],
             other and other["seconds_per_step"], row.get("ratio"))
    return " ".join(f"{'' if cell is None else cell if isinstance(cell, str) else f'{cell:.3g}':>{width}}"
                    for cell, (_, width) in zip(cells, COLUMNS)) + f"  {swept}".rstrip()


def operator_lines(row: dict, count: int | None) -> list:
    """Lines to stand under a row: what its operators took, the longest first, how often they ran, and their share."""
    operators = row["operators"] or []
    seconds = sum(spent for _, _, spent in operators)
    return [f"{name:>24} {times or '':>6} {spent:>9.3f} s {spent / seconds:>5.1%}"
            for name, times, spent in (*operators[:-1][:count], *operators[-1:])]


def plot(rows: list, swept: str) -> Image.Image:
    """Seconds a row's work took, and the memory, over what is varied; ours in blue, diffusers' in orange."""
    x = [row["height" if swept == "size" else swept] for row in rows]
    charts = []
    for title, key, unit in (("seconds", "seconds", 1), ("peak GiB", "peak_memory_bytes", 2**30)):
        curves = []
        for name, colour, figures in (("here", BLUE, rows), ("diffusers", ORANGE, [r.get("diffusers") for r in rows])):
            for task in dict.fromkeys(row["task"] for row in rows):
                points = [(at, np.median(f[key][1:] or f[key]) if key == "seconds" else f[key] / unit)
                          for at, f, row in zip(x, figures, rows) if f and row["task"] == task]
                if points:
                    curves.append(Curve(*zip(*points), colour, f"{task} {name}"))
        charts.append(np.asarray(chart(curves, f"{title} over {swept}:", from_zero=True)))
    return Image.fromarray(np.concatenate(charts))
