"""What the operators of a unit of work take, by MindSpore's own profiler."""
from __future__ import annotations

import csv
import tempfile
from pathlib import Path
from typing import Callable

from mindspore.profiler import ProfilerActivity, profile, tensorboard_trace_handler

from ldm.device import on_ascend
from ldm.errors import UserError


def operator_times(work: Callable) -> list:
    """Do the work once more, under the profiler, and say where its time went.

    Args:
        work: a unit of ip_adapter.benchmark.tasks, done before, so that nothing is left to compile.

    Returns:
        For every kind of operator, the one that takes longest first: its name, how often it ran, seconds of all its
        runs together. Last, as "between operators" with no count, what is left of the work's seconds.

    Raises:
        UserError: this is not a CPU, whose operators alone are in the table that is read here.
    """
    if on_ascend():
        raise UserError("--operators reads the profile of a CPU; on Ascend use MindSpore's profiler and its MindStudio "
                        "views")
    with tempfile.TemporaryDirectory() as folder:
        with profile(activities=[ProfilerActivity.CPU], on_trace_ready=tensorboard_trace_handler(folder)):
            seconds, _ = work()
        table, = Path(folder).glob("*/FRAMEWORK/cpu_op_type_info_*.csv")
        with table.open(newline="") as file:
            times = [(row["op_type"], int(row["type_occurrences"]), float(row["total_compute_time"]) / 1000)
                     for row in csv.DictReader(file)]
    times.sort(key=lambda operator: -operator[2])
    return [*times, ("between operators", None, seconds - sum(spent for _, _, spent in times))]
