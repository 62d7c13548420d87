"""Damaged CSV and image files: reading works, or one line says why not; in little time and memory."""
from __future__ import annotations

import io
import resource
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ip_adapter.data.dataset import ImageTextDataset
from ip_adapter.images.preprocess import open_image, shown_size
from ldm.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL.*")  # on metadata, as programs ignore them
MUTATIONS = 250  # of each kind of file
CSV = 'dir,text,image_prompt\r\na.png,"a dog, ""Rex""",\r\n"b.png",中文 🎨,a.png\nc.png,"two\nlines"\n'.encode()


def image_bytes(kind: str) -> bytes:
    """A small image with EXIF data, and with transparency where the format has it."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 4), np.uint8)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    image, data = Image.fromarray(pixels), io.BytesIO()
    if kind in ("JPEG", "PPM"):
        image = image.convert("RGB")
    more = {} if kind in ("GIF", "PPM", "BMP") else {"exif": exif}
    image.save(data, kind, **more, **({"compression": "tiff_lzw"} if kind == "TIFF" else {}))
    return data.getvalue()


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """The same with one to four bytes, or stretches of bytes, changed, inserted or deleted, or with its end cut off."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        # Half of the changes are at the beginning, where headers are.
        place = int(rng.integers(min(len(data), 64) if rng.random() < 0.5 else len(data)))
        length = int(rng.choice([1, 1, 2, 4, 16]))
        what = rng.integers(5)
        if what == 0:
            data[place] ^= 1 << int(rng.integers(8))
        elif what == 1:
            data[place:place + length] = rng.choice([b"\xff", b"\0", b'"', b"\x7f"]) * length
        elif what == 2:
            data[place:place] = rng.bytes(length)
        elif what == 3:
            del data[place:place + length]
        else:
            del data[max(1, place):]
        data = data or bytearray(b"\0")
    return bytes(data)


def memory() -> int:
    """Bytes this process has held at most."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def attempts(content: bytes, path: Path, read) -> int:
    """Read damaged copies of a file; returns how many could be read all the same."""
    rng, fine, slowest = np.random.default_rng(1), 0, 0.0
    for _ in range(MUTATIONS):
        path.write_bytes(mutated(content, rng))
        begun = time.perf_counter()
        try:
            read()
            fine += 1
        except UserError as error:
            assert "\n" not in str(error) and path.name in str(error)
        slowest = max(slowest, time.perf_counter() - begun)
    assert slowest < 5
    return fine


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP", "PPM"])
def test_images(tmp_path, kind):
    path, before = tmp_path / "image", memory()

    def read():
        image = open_image(path)
        assert image.mode == "RGB" and image.size == shown_size(path)
    attempts(image_bytes(kind), path, read)
    assert memory() - before < 2 << 30


def test_csv_files(tmp_path):
    for name in "abc":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    path = tmp_path / "img_txt.csv"

    def read():
        dataset = ImageTextDataset(tmp_path, 8)
        assert dataset.sample(0, None).pixels.shape == (3, 8, 8)
        assert all(dataset.text(row).encode() is not None for row in range(len(dataset)))
    assert attempts(CSV, path, read) > MUTATIONS / 10
