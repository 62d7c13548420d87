"""What a training says about itself: log.csv, and its progress on the terminal or in the log of a job."""
from __future__ import annotations

import csv
import logging
import time
from pathlib import Path

from tqdm import tqdm

from ldm.files import printable, replacing

log = logging.getLogger(__name__)

LOG_COLUMNS = ("step", "loss", "learning_rate", "loss_scale", "overflow", "images_per_second")
SAY_SECONDS = 30  # between the lines of a run without a terminal


def read_log(path: Path, last: int) -> list:
    """The rows of a log up to a step, in the order of their steps; of two of one step the later.

    The log is for people, who may have saved it with a spreadsheet: semicolons, tabs and decimal commas are read. Rows
    that are not are left out with a notice, for no later step depends on them.

    Args:
        path: a log.csv; that there is none is no mistake.
        last: step behind which rows are dropped, since these steps are made again.
    """
    try:
        lines = Path(path).read_bytes().decode("utf-8-sig", "replace").replace("\r", "\n").split("\n")
    except FileNotFoundError:
        return []
    delimiter = next((mark for mark in ";\t" if mark in lines[0]), ",")
    names = _fields(lines[0], delimiter)
    if not set(names) >= set(LOG_COLUMNS):
        names = list(LOG_COLUMNS)
    rows, odd = {}, 0
    for line in filter(str.strip, lines[1:]):
        row = _row(names, _fields(line, delimiter))
        if row:
            rows[int(row["step"])] = row
        odd += row is None
    if odd:
        log.warning("%s: %s cannot be read and will be left out; the training itself does not depend on %s",
                    printable(path), counted(odd, "row"), "it" if odd == 1 else "them")
    return [rows[step] for step in sorted(rows) if step <= last]


def _fields(line: str, delimiter: str) -> list:
    return [field.strip(' "') for field in line.split(delimiter)]


def _row(names: list, fields: list) -> dict | None:
    """The columns of a log, or None if they are not all there and numbers."""
    if len(fields) != len(names):
        return None
    found = dict(zip(names, fields))
    row = {name: found[name].replace(",", ".") for name in LOG_COLUMNS}
    try:
        for value in row.values():
            float(value)
        return row if int(row["step"]) > 0 else None
    except ValueError:
        return None


def counted(number: int, what: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


class LogFile:
    """log.csv, which appears with the first row that is added and is on disk after every row.

    Args:
        path: of the file. An older one stays as it is until then.
        rows: of the steps before.
    """

    def __init__(self, path: Path, rows: list):
        self.path, self.rows, self._file = path, rows, None

    def add(self, row: dict) -> None:
        """Add the row of a step."""
        self.rows.append(row)
        if self._file:
            csv.DictWriter(self._file, LOG_COLUMNS).writerow(row)
            self._file.flush()
            return
        with replacing(self.path, text=True) as file:  # killed at any moment, a run leaves the rows of all before it
            writer = csv.DictWriter(file, LOG_COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)
        self._file = open(self.path, "a", newline="", encoding="utf-8")

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()
            self._file = None


class Progress:
    """A bar on a terminal; without one a line at the first step, at the last, and about every half minute.

    Args:
        step: made before.
        total: steps of the training.
        shown: whether this process speaks.
    """

    def __init__(self, step: int, total: int, shown: bool):
        self.first, self.total, self.shown, self._said = step + 1, total, shown, 0.0
        self.bar = tqdm(total=total, initial=step, desc="training", unit="step", disable=None if shown else True)

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self.shown:
            self.bar.clear()
            log.info("%s", text)
            self.bar.refresh()

    def report(self, step: int, loss: float, rate: float, images: float) -> None:
        """Tell how a step went; `done` moves the bar on, once all that belongs to the step is done."""
        self.bar.set_postfix(loss=f"{loss:.4f}", lr=f"{rate:.2g}", **{"img/s": f"{images:.2f}"})
        due = step in (self.first, self.total) or time.monotonic() - self._said >= SAY_SECONDS
        if self.shown and self.bar.disable and due:
            log.info("step %d of %d: loss %.4f, learning rate %.2g, %.2f images per second", step, self.total, loss,
                     rate, images)
            self._said = time.monotonic()

    def done(self) -> None:
        """One step more."""
        self.bar.update()

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()
