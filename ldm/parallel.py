"""Several processes that train together: how they find each other, average what they compute, and leave.

`msrun` tells MindSpore all it needs, and so does `mpirun` on Ascend. On the CPU MindSpore does not understand Open MPI:
there every process takes over what msrun would have given it, and rank 0 starts the scheduler that msrun would have
started. This has to happen before MindSpore is imported: scripts begin with `prepare_process`.
"""
from __future__ import annotations

import contextlib
import ctypes
import glob
import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Callable, NamedTuple

from ldm.errors import UserError

if TYPE_CHECKING:  # imported when it is needed: a script that only answers -h has no use for it
    import numpy as np

MEETING_SECONDS = 60  # how long a process waits for rank 0 to say where the scheduler is
# How long MindSpore waits for a sign of life of another process: on a machine with more processes than cores a graph
# compiles for minutes, and nothing else of that process runs meanwhile.
NODE_TIMEOUT_SECONDS = 1800
_parent = os.getppid()  # at the start, to notice when it is gone
_scheduler: list = []  # the process that rank 0 has started
_joined: list = []  # the group, once joined
_local_size = 1  # processes of this job on this machine
_adopted = False  # whether mpirun's variables were turned into MindSpore's


class Group(NamedTuple):
    """The processes of a run; the default is one alone."""

    rank: int = 0
    size: int = 1


def prepare_process() -> None:
    """Set what MindSpore reads when it is imported; the first thing a script does.

    Raises:
        UserError: the variables of mpirun make no sense.
    """
    # MindSpore prints operator fallbacks as warnings; they are no news to somebody who wants an image. What is no
    # level of its log ends the process when it is imported.
    if os.environ.get("GLOG_v") not in ("0", "1", "2", "3", "4"):
        os.environ["GLOG_v"] = "3"
    os.environ.setdefault("MS_NODE_TIMEOUT", str(NODE_TIMEOUT_SECONDS))
    global _local_size
    _local_size = _local_processes()  # now: mpirun's variables are about to go
    adopt_open_mpi()


def adopt_open_mpi() -> None:
    """Under `mpirun` on the CPU, turn Open MPI's variables into MindSpore's; rank 0 also starts the scheduler.

    The process ends with the one that started it, also if that is killed.

    Raises:
        UserError: the variables make no sense.
    """
    rank, size = os.environ.get("OMPI_COMM_WORLD_RANK", "0"), os.environ.get("OMPI_COMM_WORLD_SIZE", "1")
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise UserError(f"OMPI_COMM_WORLD_RANK {rank} and OMPI_COMM_WORLD_SIZE {size} are no rank and size, as mpirun "
                        "sets them; unset both, or start the script by mpirun")
    size = int(size)
    if size == 1 or "MS_ROLE" in os.environ or glob.glob("/dev/davinci*"):
        return
    global _adopted
    _adopted = True
    _end_with_parent(signal.SIGTERM)
    job = os.environ.get("PMIX_NAMESPACE") or os.environ.get("OMPI_MCA_ess_base_jobid", str(os.getppid()))
    # The address of a socket that is no file: it is gone with rank 0, whatever happens.
    meeting = "\0ip_adapter-" + hashlib.sha256(f"{os.getuid()} {job} {os.getppid()}".encode()).hexdigest()[:16]
    for variable in [v for v in os.environ if v.startswith(("OMPI_", "PMIX_", "PRTE_"))]:
        del os.environ[variable]
    os.environ.update(MS_ROLE="MS_WORKER", MS_WORKER_NUM=str(size), MS_NODE_ID=rank, MS_SCHED_HOST="127.0.0.1")
    if rank == "0":
        os.environ["MS_SCHED_PORT"] = str(_free_port())
        _start_scheduler()
        _tell_port(meeting, size - 1)
    else:
        os.environ["MS_SCHED_PORT"] = _ask_port(meeting)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start_scheduler() -> None:
    """A process that only introduces the others; it dies with this one, whatever happens."""
    program = "from mindspore import communication; communication.init('mccl')"
    process = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "MS_ROLE": "MS_SCHED"},
                               stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               preexec_fn=tied_to_parent(), start_new_session=True)
    _scheduler.append(process)


def _tell_port(meeting: str, others: int) -> None:
    """Let a thread answer the other processes that ask for the scheduler's port."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(meeting)
    listener.listen(others)
    port = os.environ["MS_SCHED_PORT"].encode()

    def answer() -> None:
        with listener:
            for _ in range(others):
                with contextlib.suppress(OSError), listener.accept()[0] as other:
                    other.sendall(port)

    threading.Thread(target=answer, name="meeting", daemon=True).start()


def _end_with_parent(number: int) -> None:
    """Ask the system for a signal when the process that started this one is gone; of no effect where it knows no such.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG


def tied_to_parent() -> Callable[[], None]:
    """A `preexec_fn` for a child process that ends with this one, whatever happens, and hears signals itself."""
    parent = os.getpid()

    def prepare() -> None:
        _end_with_parent(signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # a script's own mask, which children would inherit
        if os.getppid() != parent:
            os._exit(1)

    return prepare


def orphaned() -> bool:
    """Whether this is a process of mpirun's, and mpirun is gone."""
    return _adopted and os.getppid() != _parent


def lost_each_other(error: RuntimeError) -> bool:
    """Whether an error of MindSpore's says that processes that had joined can no longer reach each other."""
    return bool(_joined) and _joined[0].size > 1


def _ask_port(meeting: str) -> str:
    deadline = time.time() + MEETING_SECONDS
    while time.time() < deadline:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as asking:
            asking.connect(meeting)
            port = asking.recv(16).decode()
            if port:  # otherwise rank 0 has just ended
                return port
        time.sleep(0.05)
    sys.exit("the first process of this mpirun has not started within a minute")


def job_size() -> int:
    """How many processes mpirun or msrun has started, as far as the environment tells."""
    sizes = [os.environ.get(name, "") for name in ("MS_WORKER_NUM", "OMPI_COMM_WORLD_SIZE")]
    return next((int(size) for size in sizes if size.isdecimal() and int(size)), 1)


def job_threads() -> int:
    """Threads to compute with on the CPU so that all processes of a job on this machine share its cores; 0 for all.

    A launcher may have bound this process to some cores: then these, but no more than its share of the launcher's.
    """
    if _local_size < 2 or not hasattr(os, "sched_getaffinity"):
        return 0
    own = shared = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError):  # the launcher is gone, or another user's
        shared = len(os.sched_getaffinity(_parent))
    return max(1, min(own, shared // _local_size))


def _local_processes() -> int:
    """How many processes of this job run on this machine; 1 if nothing tells."""
    number = os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "")
    if number.isdecimal():
        return int(number)
    # msrun tells how many there are on all machines; they are all here if its scheduler has a local address.
    alone = os.environ.get("MS_SCHED_HOST", "127.0.0.1") in ("127.0.0.1", "localhost")
    return job_size() if alone else 1


def join() -> Group:
    """Meet the other processes.

    Raises:
        UserError: this process was started alone, or they cannot be reached.
    """
    from mindspore import communication

    from ldm.device import on_ascend
    if "MS_ROLE" not in os.environ and "OMPI_COMM_WORLD_SIZE" not in os.environ:
        raise UserError("--is_parallel True: this process was started alone; start it as `mpirun -n 2 python "
                        "SCRIPT.py ...` or `msrun --worker_num=2 --local_worker_num=2 --join=True SCRIPT.py ...`")
    if _adopted:  # MindSpore lets no other thread run while it waits for the others, so nobody would hear SIGTERM
        _end_with_parent(signal.SIGKILL)
    try:
        communication.init("hccl" if on_ascend() else "mccl")
    except RuntimeError as error:
        raise UserError(f"--is_parallel True: the processes cannot reach each other ({str(error).splitlines()[0]})"
                        ) from None
    if _adopted:
        _end_with_parent(signal.SIGTERM)
    _joined.append(Group(communication.get_rank(), communication.get_group_size()))
    return _joined[0]


def average(values: np.ndarray) -> np.ndarray:
    """The mean over all processes of a small float32 array; every process has to call it. Alone, the array itself."""
    if not _joined:
        return values
    from mindspore import Tensor, ops
    return ops.AllReduce()(Tensor(values)).asnumpy() / _joined[0].size


def _wait_for_all() -> None:
    """Wait until every process is done; the CPU has no Barrier.

    Rank 0 sends the sum to the others and waits until it is taken. One that has it may be gone before rank 0 knows,
    which then sees a failure; but nobody has it who is not done, so that is as good. The pause makes it rare.
    """
    import numpy as np
    with contextlib.suppress(RuntimeError):
        average(np.zeros(1, np.float32))
    if _joined[0].rank:
        time.sleep(1)


def leave(status: int) -> None:
    """Part from the other processes, if there are any.

    With a scheduler of our own the process ends here and at once: MindSpore would wait for it for up to a minute. That
    of msrun, and HCCL, want a farewell, which MindSpore says when Python exits.

    Args:
        status: exit status; with 0 all processes wait for each other first, for one that is gone breaks the others.
    """
    if not _joined:
        return
    if status == 0:
        _wait_for_all()
    if not _adopted:
        return
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for process in _scheduler:
        process.kill()
        process.wait()
    os._exit(status)
