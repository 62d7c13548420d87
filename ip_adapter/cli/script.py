"""Start and end of every script: signals, mistakes as one line with exit status 2, nothing unfinished left behind.

Only the standard library is imported here, so that a script can be interrupted cleanly from its first moment on.
"""
from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Callable, Iterator

from ldm.errors import UserError
from ldm.files import printable, remove_unfinished
from ldm.parallel import leave, lost_each_other, orphaned, prepare_process

SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_collecting: list = []  # lists that receive the number of a signal instead of the process being stopped
_watching = False


def run_script(main: Callable[[], None]) -> None:
    """Run the `main` of a script as the whole of this process: `execute`, with signals handled."""
    watch_signals()
    execute(lambda: (prepare_process(), main()))


def execute(main: Callable[[], None]) -> None:
    """Call `main`; a user's mistake becomes one line and status 2, a signal one line and status 130 or 143.

    A KeyboardInterrupt may carry the number of the signal that it stands for; SIGTERM becomes status 143.

    Raises:
        SystemExit: with that status; nothing is raised after success.
    """
    try:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, ValueError):  # a stream of a notebook or a test
                stream.reconfigure(errors="backslashreplace")
        _check_current_folder()
        main()
        leave(0)
    except UserError as error:
        sys.exit(_leave(2, f"error: {error}"))
    except KeyboardInterrupt as stop:  # of the signal that a training has collected, or of Python's own handler
        number = stop.args[0] if stop.args else signal.SIGINT
        sys.exit(_leave(128 + number, _stopped(number)))
    except BrokenPipeError:  # who reads our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(_leave(141, "the reader of the output is gone"))
    except MemoryError as error:
        sys.exit(_leave(2, f"error: out of memory {error}; make fewer or smaller images at once"))
    except OSError as error:
        if error.filename is None and not error.strerror:
            raise
        where = f"{printable(error.filename)}: " if error.filename is not None else ""
        sys.exit(_leave(2, f"error: {where}{error.strerror or error}; check the path, its permissions and free space"))
    except RuntimeError as error:
        if not lost_each_other(error):
            raise
        sys.exit(_leave(2, "error: the processes of this job lost each other; see what the first of them said, and go "
                           "on with --resume True"))


def _check_current_folder() -> None:
    """Files are named relative to it, and MindSpore asks for it when it is imported.

    Raises:
        UserError: it does not exist any more.
    """
    try:
        os.getcwd()
    except OSError as error:
        raise UserError(f"the current folder cannot be used ({error.strerror}): it was deleted or moved; change into "
                        "another one and start again") from None


def _stopped(number: int) -> str:
    return f"{SIGNALS[number]}; finished images and files are kept, unfinished ones removed"


def _leave(status: int, line: str) -> int:
    _say(line)
    leave(status)
    return status


def _say(line: str) -> None:
    """One line on standard error, without line breaks and terminal codes, on a line of its own."""
    start = "\n" if sys.stderr.isatty() else ""  # a progress bar leaves the cursor behind it
    with contextlib.suppress(OSError, ValueError):
        print(f"{start}{Path(sys.argv[0]).name}: {printable(' '.join(line.split()))}", file=sys.stderr, flush=True)


def watch_signals(module: str = "__main__") -> None:
    """Let a thread wait for SIGINT and SIGTERM; no other thread is ever interrupted by them.

    A script that imports much before `run_script` calls this first. A thread that NumPy has started before would take
    the signal, and the process end without a word.

    MindSpore replaces Python's handler of SIGINT once a graph has run, and an exception raised inside a callback of its
    C++ code aborts the process. Blocked in all threads, neither happens: those started later inherit the mask.

    Args:
        module: that calls this; nothing happens unless it is the program.
    """
    global _watching
    if module != "__main__" or _watching or threading.current_thread() is not threading.main_thread():
        return
    _watching = True
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_wait_for_signals, name="signals", daemon=True).start()


def _wait_for_signals() -> None:
    while True:
        number = signal.sigwait(SIGNALS)
        if _collecting and not _collecting[-1] and not orphaned():
            _collecting[-1].append(number)
            continue
        remove_unfinished()
        _say(_stopped(number))
        leave(128 + number)
        os._exit(128 + number)


@contextlib.contextmanager
def collected_signals() -> Iterator[list]:
    """A list that takes the first signal which arrives within the block; a second one stops the process at once.

    Outside of `run_script`, as in a notebook or a test, signals do what they did before.
    """
    received: list = []
    _collecting.append(received)
    try:
        yield received
    finally:
        _collecting.remove(received)
