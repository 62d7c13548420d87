"""The folder that a long evaluation writes into: its own, tried before the work, each file in it whole."""
from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Iterator

from PIL import Image

from ldm.errors import UserError
from ldm.files import check_writable, locked, printable, reason, replacing, temporary_folder


@contextlib.contextmanager
def own_folder(folder: Path, flag: str) -> Iterator[None]:
    """Keep a folder for this process while the block runs; made if missing, and gone again if nothing was written.

    Args:
        folder: to write into.
        flag: that named it, for messages.

    Raises:
        UserError: it cannot be written to, or another process writes into it.
    """
    check_writable(folder, flag, folder=True)
    with contextlib.ExitStack() as stack:
        with writing(folder, flag):
            # Holds the place: a signal removes it, and with it the folders made for it that are still empty.
            stack.enter_context(temporary_folder(folder, prefix=".running."))
            stack.enter_context(locked(folder, flag))
        yield


@contextlib.contextmanager
def writing(folder: Path, flag: str) -> Iterator[None]:
    """Turn what the system says to a write, such as a full disk, into one line.

    Raises:
        UserError: something in the block could not be written.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{flag} {printable(folder)}: cannot be written ({reason(error)}); what is done so far is "
                        "kept; free some space and run it again, or name another folder") from None


def save_image(path: Path, image: Image.Image) -> None:
    """Write a PNG whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(path) as file:
        image.save(file, "PNG")
