"""Training data: a CSV file, its pictures with captions, and what is cut out of each; broken ones are skipped."""
from __future__ import annotations

import csv
import itertools
import logging
import os
import threading
from array import array
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np
from PIL import Image

from ip_adapter.images.preprocess import MAX_PIXELS, MAX_RATIO, clip_pixels, latent_pixels, open_image
from ldm.errors import UserError
from ldm.files import printable, reason, valid_unicode

CSV_NAME = "img_txt.csv"
MAX_FIELD = 100_000_000  # characters; Python's csv refuses a whole file for one of 131,072
COLUMNS = ("dir", "text")
PROMPT = "image_prompt"  # a column that may be there: the picture prompt, where it is another picture than `dir`

log = logging.getLogger(__name__)


class Sample(NamedTuple):
    """One picture with its caption and its picture prompt."""

    pixels: np.ndarray  # (3, height, width) float32 in [-1, 1], for the autoencoder
    clip_pixels: np.ndarray  # (3, 224, 224) float32, the whole picture prompt for CLIP's image encoder
    text: str
    original_size: tuple  # (height, width) in pixels before resizing
    crop: tuple  # (top, left) of `pixels` in the resized picture
    index: int  # the row really used


class Strings:
    """Many texts in little memory: one buffer of UTF-8, and where each text ends."""

    def __init__(self):
        self._bytes, self._ends = bytearray(), array("q", [0])

    def append(self, text: str) -> None:
        """Add one text at the end; halves of surrogate pairs become U+FFFD."""
        try:
            self._bytes += text.encode()
        except UnicodeEncodeError:
            self._bytes += valid_unicode(text).encode()
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> str:
        return self._bytes[self._ends[i]:self._ends[i + 1]].decode()


def find_csv(path: Path, flag: str) -> Path:
    """The CSV file of a data set: `img_txt.csv` in a folder, or the .csv file given.

    Raises:
        UserError: there is none.
    """
    is_folder = os.path.isdir(path)  # unlike pathlib's, it raises nothing at a name too long
    file = path / CSV_NAME if is_folder else path
    if not os.path.isfile(file) or file.suffix.lower() != ".csv":
        found = "neither a folder nor a .csv file" if os.path.exists(path) else "no such file or folder"
        found = f"holds no {CSV_NAME}" if is_folder else found
        raise UserError(f"{flag} {printable(path)}: {found}; give a folder with pictures and {CSV_NAME}, or a .csv "
                        "file")
    return file


def read_csv(path: Path, flag: str) -> tuple:
    """The columns `dir`, `text` and `image_prompt` of a CSV file in UTF-8, as `Strings`; what is missing is empty.

    Every row is checked: pandas drops surplus fields, such as the rest of a caption whose comma is not quoted, without
    a word. NUL characters, as a crash leaves them, are dropped.

    Raises:
        UserError: not a CSV file, empty, a column is missing, a row is malformed, or none names a picture.
    """
    columns, name = (Strings(), Strings(), Strings()), f"{flag} {printable(path)}"
    csv.field_size_limit(MAX_FIELD)
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogatepass") as file:
            rows = csv.reader((line.replace("\0", "") for line in file), strict=True)
            header = next(rows, None)
            if header is None:
                raise UserError(f"{name}: is empty; expected the columns {','.join(COLUMNS)}")
            if not set(COLUMNS) <= set(header):
                raise UserError(f"{name}: has the columns {', '.join(map(_cut, header[:10]))}; expected "
                                f"{','.join(COLUMNS)} in the first line")
            places = [header.index(column) if column in header else len(header) for column in (*COLUMNS, PROMPT)]
            for row in filter(None, rows):  # a blank line is no row
                if len(row) > len(header):
                    raise UserError(f"{name}: line {rows.line_num} has {len(row)} fields, expected {len(header)}; put "
                                    "captions with commas in double quotes")
                for strings, place in zip(columns, places):
                    strings.append(row[place] if place < len(row) else "")
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        why = reason(error) if isinstance(error, OSError) else error
        raise UserError(f"{name}: cannot be read ({why}); expected CSV in UTF-8, captions with commas in double "
                        "quotes") from None
    if not any(columns[0]):
        raise UserError(f"{name}: none of its {len(columns[0])} rows names a picture in the column dir; "
                        f"expected paths relative to {printable(path.parent)}")
    return columns


def _cut(text: str) -> str:
    return repr(text[:40])


class ImageTextDataset:
    """Pictures with captions, from a folder with `img_txt.csv`; pictures are opened when they are asked for.

    Args:
        folder: with the pictures and the CSV file, or the path of a .csv file among its pictures.
        size: side of the square that is trained on, in pixels; see `size_of_row` for other shapes.
        random_crop: draw the place of what is cut out instead of taking the centre.
        max_broken: so many pictures that cannot be read are skipped.
        flag: the flag that named the folder, for messages.

    Raises:
        UserError: no CSV file, or it cannot be used.
    """

    def __init__(self, folder, size: int, random_crop: bool = False, max_broken: int = 100, flag: str = "--data_path"):
        self.random_crop, self.max_broken, self.flag = random_crop, max_broken, flag
        self.size_of_row: Callable[[int], tuple] = lambda row: (size, size)  # (height, width) in pixels, as given out
        self.csv = find_csv(Path(folder), flag)
        self._paths, self._texts, self._prompts = read_csv(self.csv, flag)
        self._broken, self._lock = set(), threading.Lock()

    def __len__(self) -> int:
        return len(self._paths)

    def text(self, i: int) -> str:
        """The caption of row `i`."""
        return self._texts[i]

    def path(self, i: int) -> Path:
        """Where the picture of row `i` is."""
        return self.csv.parent / self._paths[i]

    def prompt_path(self, i: int) -> Path:
        """Where the picture prompt of row `i` is: the picture itself where the row names no other."""
        return self.csv.parent / (self._prompts[i] or self._paths[i])

    def prompt(self, i: int) -> Image.Image:
        """The picture prompt of row `i`, as `picture`."""
        return open_image(self.prompt_path(i), f"{self.flag}, row {i + 1}:")

    def picture(self, i: int) -> Image.Image:
        """The picture of row `i`, whole, 8-bit RGB.

        Raises:
            UserError: it cannot be read.
        """
        return open_image(self.path(i), f"{self.flag}, row {i + 1}:")

    def sample(self, i: int, rng: np.random.Generator) -> Sample:
        """Row `i` for training or, if its picture cannot be read, the next row whose picture can, wrapping round.

        Args:
            i: row, from 0.
            rng: draws the place of the crop.

        Raises:
            UserError: more than `max_broken` pictures cannot be read, or none can.
        """
        return self.first_readable(i, lambda row: self._read(row, rng, self.size_of_row(i)))

    def square(self, i: int, size: int) -> Image.Image:
        """The middle of the picture of row `i` or, as `sample` has it, of the next one; `size` pixels wide and high."""
        return self.first_readable(i, lambda row: self._fitted(row, self.picture(row), (size, size), None)[0])

    def first_readable(self, i: int, read: Callable[[int], Any]) -> Any:
        """What `read` gives for row `i` or, if it raises UserError, for the first after it, wrapping round.

        Raises:
            UserError: more than `max_broken` rows cannot be read, or none can.
        """
        for row in itertools.chain(range(i, len(self)), range(i)):
            if row not in self._broken:
                try:
                    return read(row)
                except UserError as error:
                    self._skip(row, error)
        raise UserError(f"{self.flag} {printable(self.csv)}: none of its {len(self)} pictures can be read, see the "
                        f"warnings; expected paths relative to {printable(self.csv.parent)}")

    def _read(self, row: int, rng: np.random.Generator, size: tuple) -> Sample:
        image = self.picture(row)
        clipped, crop = self._fitted(row, image, size, rng if self.random_crop else None)
        prompt = self.prompt(row) if self._prompts[row] else image
        return Sample(latent_pixels(clipped)[0], clip_pixels(prompt), self.text(row), image.size[::-1], crop, row)

    def _fitted(self, row: int, image: Image.Image, size: tuple, rng: np.random.Generator | None) -> tuple:
        return fit(image, size, rng, f"{self.flag} {printable(self.path(row))}")

    def _skip(self, row: int, error: Exception) -> None:
        """Remember and report a broken row, once however many threads meet it."""
        with self._lock:
            if row not in self._broken:
                self._broken.add(row)
                log.warning("skipped: %s", error)
            if len(self._broken) > self.max_broken:
                raise UserError(f"{self.flag} {printable(self.csv)}: {len(self._broken)} pictures cannot be read, more "
                                f"than --max_broken {self.max_broken}; mend them or allow more; the last: {error}")


def fit(image: Image.Image, size: tuple, rng: np.random.Generator | None, name: str) -> tuple:
    """Resize until a rectangle is just covered (bicubic on 8-bit pixels, as `clip_pixels`), and crop it.

    Args:
        image: 8-bit RGB.
        size: (height, width) in pixels.
        rng: draws the place of the rectangle; the centre without.
        name: of the picture, for messages.

    Returns:
        The rectangle, and its (top, left) in the resized picture.

    Raises:
        UserError: the picture is so narrow that it would become absurdly long.
    """
    if image.width * size[0] <= image.height * size[1]:
        width, height = size[1], int(size[1] * image.height / image.width)
    else:
        width, height = int(size[0] * image.width / image.height), size[0]
    if width * height > MAX_PIXELS or max(image.size) > MAX_RATIO * min(image.size):
        raise UserError(f"{name}: {image.width} x {image.height} pixels are too narrow, resized they would be "
                        f"{width} x {height}")
    image = image.resize((width, height), Image.BICUBIC)
    room = height - size[0], width - size[1]
    top, left = (side // 2 if rng is None else int(rng.integers(side + 1)) for side in room)
    return image.crop((left, top, left + size[1], top + size[0])), (top, left)
