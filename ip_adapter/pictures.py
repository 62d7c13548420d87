"""Pictures out: names that never collide, settings inside the PNG, grids, and the model's fingerprint."""
from __future__ import annotations

import hashlib
import io
import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from ldm.errors import UserError


def save_png(folder: Path, image: Image.Image, settings: dict, pattern: str = "{:05d}.png") -> Path:
    """Write a picture under the first free number, with its settings as text metadata.

    The whole file appears at once or not at all, and never in the place of another, also with several processes
    writing to one folder.

    Args:
        folder: made if missing.
        image: RGB.
        settings: written as one international text chunk each.
        pattern: file name for a number.

    Returns:
        Where it was written.

    Raises:
        UserError: the folder cannot be written to.
    """
    info = PngImagePlugin.PngInfo()
    for key, value in settings.items():
        info.add_itxt(key, str(value))
    data = io.BytesIO()
    image.save(data, "PNG", pnginfo=info)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=".tmp") as temporary:
            temporary.write(data.getvalue())
            temporary.flush()
            os.chmod(temporary.name, 0o644)
            number = _last_number(folder, pattern) + 1
            while True:
                path = folder / pattern.format(number)
                try:
                    os.link(temporary.name, path)  # fails if the name is taken, unlike a rename
                    return path
                except FileExistsError:
                    number += 1
    except OSError as error:
        raise UserError(f"--output_path {folder}: cannot write a picture of {len(data.getvalue())} bytes "
                        f"({error.strerror or error}); free some space or choose another folder") from None


def _last_number(folder: Path, pattern: str) -> int:
    """The highest number taken in the folder, -1 if none."""
    prefix, suffix = pattern.split("{:05d}")
    taken = [name[len(prefix) : len(name) - len(suffix)] for name in os.listdir(folder)
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
    cells = [np.asarray(ImageOps.pad(image, (width, height), color="white")) for image in inputs]
    return Image.fromarray(np.concatenate(cells + list(pictures), axis=1))


def file_sha256(path: Path) -> str:
    """sha256 of a file, remembered beside it as `<file>.sha256` in the format of sha256sum.

    A note older than the file is computed again; a folder that cannot be written to only costs time.
    """
    note = path.with_name(path.name + ".sha256")
    if note.exists() and note.stat().st_mtime >= path.stat().st_mtime:
        words = note.read_text().split()
        if len(words) == 2 and len(words[0]) == 64 and words[1] == path.name:
            return words[0]
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    write_sha256(path, digest.hexdigest())
    return digest.hexdigest()


def write_sha256(path: Path, digest: str) -> None:
    """Leave the note that `file_sha256` reads, where the folder allows it."""
    try:
        path.with_name(path.name + ".sha256").write_text(f"{digest}  {path.name}\n")
    except OSError:
        pass
