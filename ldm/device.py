"""The one place that knows which device runs the networks.

Everything that differs between Ascend and the CPU (convolution, attention, default precision) asks
`on_ascend()` here; nothing else in the project looks at the MindSpore context.
"""
from __future__ import annotations

import functools
import gc
import os
from pathlib import Path

import mindspore as ms
from mindspore import Tensor

from ldm.errors import UserError
from ldm.parallel import job_threads

DTYPES = {"float16": ms.float16, "float32": ms.float32}


def start_device(device_target: str | None = None, ms_mode: int | None = None, cpu_threads: int = 0) -> None:
    """Choose the device and the execution mode for this process.

    Args:
        device_target: "Ascend", "CPU", or None for Ascend if there is one, else the CPU.
        ms_mode: 0 compiles networks into graphs, 1 runs operator by operator (PyNative), None is `default_mode()`.
        cpu_threads: that compute on the CPU, 0 for one a core; the processes of an mpirun or msrun job share the cores.

    Raises:
        UserError: the device does not exist here.
    """
    _freeze_imports()
    target = device_target or ms.get_context("device_target")  # MindSpore's own default: Ascend if there is one
    try:
        ms.set_device(target)
    except RuntimeError:
        raise UserError(f"--device_target {target}: MindSpore finds no such device here; "
                        "use --device_target CPU") from None
    mode = default_mode() if ms_mode is None else ms_mode
    ms.set_context(mode=ms.GRAPH_MODE if mode == 0 else ms.PYNATIVE_MODE)
    if target == "CPU":
        # Asynchronous launches gain nothing where host and device are the same cores: the two threads take them
        # from each other, and an operator costs 4 ms (a time slice) instead of 50 us.
        ms.runtime.launch_blocking()
        threads = cpu_threads or job_threads()
        if threads:
            ms.device_context.cpu.op_tuning.threads_num(threads)


@functools.cache
def _freeze_imports() -> None:
    """Leave what importing MindSpore has made out of Python's collections, a tenth of a short run; once a process."""
    gc.freeze()


def keep_graphs(folder: Path) -> None:
    """Let MindSpore keep compiled graphs in a folder, and take those it finds there for its own: they must be."""
    os.environ.update(MS_COMPILER_CACHE_ENABLE="1", MS_COMPILER_CACHE_PATH=str(folder.absolute()))


def on_ascend() -> bool:
    """Whether networks built and run now use Ascend operators."""
    return ms.get_context("device_target") == "Ascend"


def finished(x: Tensor) -> Tensor:
    """x, on the CPU when a graph has really made it; on Ascend the host runs ahead.

    The next operator would wait for it by asking again and again, which takes half of one of two cores from the graph.
    """
    if not on_ascend():
        x.asnumpy()
    return x


def default_mode() -> int:
    """0 (graph) on Ascend, 1 (PyNative) on the CPU."""
    return 0 if on_ascend() else 1


def default_dtype() -> str:
    """Name of the dtype used when none is asked for: float16 on Ascend, float32 on the CPU."""
    return "float16" if on_ascend() else "float32"
