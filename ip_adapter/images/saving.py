"""Pictures out: names that never collide, settings inside the PNG, grids, and the model's fingerprint."""
from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from ldm.errors import UserError
from ldm.files import cache_folder, printable, reason, valid_unicode, write_new, write_text


def save_png(folder: Path, image: Image.Image, settings: dict, pattern: str = "{:05d}.png") -> Path:
    """Write a picture under the first free number, with its settings as text metadata.

    The whole file appears at once or not at all, and never in the place of another, also with several processes
    writing to one folder.

    Args:
        folder: made if missing.
        image: RGB.
        settings: written as one international text chunk each, whatever text it is.
        pattern: file name for a number.

    Returns:
        Where it was written.

    Raises:
        UserError: the folder cannot be written to.
    """
    info = PngImagePlugin.PngInfo()
    for key, value in settings.items():
        info.add_itxt(key, valid_unicode(value))
    data = io.BytesIO()
    image.save(data, "PNG", pnginfo=info)
    try:
        number = _last_number(folder, pattern) + 1
        while not write_new(folder / pattern.format(number), data.getvalue()):
            number += 1
        return folder / pattern.format(number)
    except OSError as error:
        raise UserError(f"--output_path {printable(folder)}: cannot write a picture of {len(data.getvalue())} bytes "
                        f"({reason(error)}); free some space or choose another folder") from None


def _last_number(folder: Path, pattern: str) -> int:
    """The highest number taken in the folder, -1 if none or if there is no folder yet."""
    prefix, suffix = pattern.split("{:05d}")
    names = os.listdir(folder) if os.path.lexists(folder) else []
    taken = [name[len(prefix) : len(name) - len(suffix)] for name in names
             if name.startswith(prefix) and name.endswith(suffix)]
    return max((int(number) for number in taken if number.isdigit()), default=-1)


def grid(inputs: list, pictures: np.ndarray) -> Image.Image:
    """The inputs, fitted into a cell with white margins, then the pictures, in one row.

    Args:
        inputs: RGB pictures of any size.
        pictures: (B, H, W, 3) uint8.

    Returns:
        One RGB picture of height H.
    """
    height, width = pictures.shape[1:3]
    cells = [np.asarray(_cell(image, width, height)) for image in inputs]
    return Image.fromarray(np.concatenate(cells + list(pictures), axis=1))


def _cell(image: Image.Image, width: int, height: int) -> Image.Image:
    """A picture fitted into the middle of a white one; of however narrow a picture at least a line is seen."""
    scale = min(width / image.width, height / image.height)
    fitted = image.resize([max(1, round(side * scale)) for side in image.size], Image.BICUBIC)
    cell = Image.new("RGB", (width, height), "white")
    cell.paste(fitted, (round((width - fitted.width) / 2), round((height - fitted.height) / 2)))
    return cell


def file_sha256(path: Path) -> str:
    """sha256 of a file, remembered in the user's cache until the file's size, time or inode differs.

    Raises:
        OSError: the file cannot be read.
    """
    before = _state(path)
    known = _remembered(path, before)
    if known is not None:
        return known
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    if _state(path) == before:  # else it was being written meanwhile
        remember_sha256(path, digest.hexdigest())
    return digest.hexdigest()


def remember_sha256(path: Path, digest: str) -> None:
    """Leave the note that `file_sha256` reads, where there is a cache that can be written to."""
    with contextlib.suppress(OSError):
        note = _note(path)
        if note is not None:
            write_text(note, f"{digest} {_state(path)}\n")


def _remembered(path: Path, state: str) -> str | None:
    """The sha256 noted for a file in this state; a note that is damaged counts as none."""
    with contextlib.suppress(OSError):
        note = _note(path)
        if note is not None and note.is_file():
            found = re.fullmatch(rb"([0-9a-f]{64}) %b\n" % state.encode(), note.read_bytes())
            return found[1].decode() if found else None
    return None


def _note(path: Path) -> Path | None:
    """Where the sha256 of a file is remembered: under a name that follows from the file's place."""
    folder = cache_folder()
    place = os.fsencode(os.path.abspath(path))
    return folder / "sha256" / hashlib.sha256(place).hexdigest()[:32] if folder else None


def _state(path: Path) -> str:
    """What changes when a file is written again or another takes its place, even one that is older."""
    stat = os.stat(path)
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"
