"""Odd but fine pictures, and what is not a picture."""
from __future__ import annotations

import io
import os
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import ip_adapter.images.preprocess as preprocess
from ip_adapter.images.preprocess import CLIP_MEAN, CLIP_STD, clip_pixels, open_image, shown_size
from ldm.errors import UserError
from tests.support.arrays import DATA
from tests.support.scripts import ROOT

FAULTS = DATA / "faults"


@pytest.mark.parametrize("turn, corner", [(1, 0), (2, 1), (3, 3), (4, 2), (5, 0), (6, 1), (7, 3), (8, 2), (9, 0)])
@pytest.mark.parametrize("kind, mode", [("jpg", "RGB"), ("png", "RGB"), ("webp", "RGB"), ("tif", "RGB"), ("tif", "L")])
def test_exif_orientation_is_applied(tmp_path, kind, mode, turn, corner):
    """The corners are numbered from left to right, then down; the first of the file is the only white one."""
    image = Image.new(mode, (40, 16))
    image.paste("white", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = turn
    image.save(tmp_path / f"turned.{kind}", exif=exif)
    opened = open_image(tmp_path / f"turned.{kind}")
    assert opened.size == shown_size(tmp_path / f"turned.{kind}") == ((16, 40) if 5 <= turn <= 8 else (40, 16))
    bright = [opened.getpixel((x, y))[0] > 200 for y in (3, opened.height - 4) for x in (3, opened.width - 4)]
    assert bright == [n == corner for n in range(4)]


@pytest.mark.parametrize("name", ["exif_garbage.png", "exif_rawprofile.png"])
def test_whole_pixels_in_damaged_exif_are_used_with_one_notice(tmp_path, name, caplog):
    path = tmp_path / name
    shutil.copy(FAULTS / name, path)
    assert shown_size(path) == (256, 256)
    assert [open_image(path).size for _ in range(3)] == [(256, 256)] * 3
    with Image.open(path) as image:
        np.testing.assert_array_equal(open_image(path), image)
    assert [name in record.getMessage() for record in caplog.records] == [True]
    assert "its EXIF data are damaged" in caplog.text and "without turning it" in caplog.text


def test_transparency_shows_white(tmp_path):
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    image.save(tmp_path / "clear.png")
    assert np.asarray(open_image(tmp_path / "clear.png")).tolist() == [[[255, 255, 255], [10, 20, 30]]]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_can_be_left_out(tmp_path, mode):
    image = Image.new("LA" if mode == "LA" else "RGBA", (2, 1), (100, 0) if mode == "LA" else (100, 100, 100, 0))
    if mode == "P":
        image = Image.new("P", (2, 1), 0)
        image.putpalette([100, 100, 100, 0, 0, 0])
        image.info["transparency"] = 0
    image.save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    assert open_image(tmp_path / "clear.png", background=None).getpixel((0, 0)) == (100, 100, 100)


def test_16_bits_are_scaled_not_cut(tmp_path):
    Image.fromarray(np.array([[0, 32896, 65535]], np.uint16)).save(tmp_path / "deep.png")
    assert np.asarray(open_image(tmp_path / "deep.png"))[0, :, 0].tolist() == [0, 128, 255]


def tiff(folder, values: list, dtype) -> str:
    """A TIFF of one row of grey values."""
    values, path = np.array([values], dtype), folder / "values.tif"
    data = io.BytesIO()
    signed = values.view(np.int32) if dtype == np.uint32 else values
    Image.fromarray(signed).save(data, "TIFF")
    tag = struct.Struct("<HHIHH")  # the sample format, which Pillow never writes as unsigned
    old, new = (tag.pack(339, 3, 1, kind, 0) for kind in (2, 1))
    path.write_bytes(data.getvalue().replace(old, new) if dtype == np.uint32 else data.getvalue())
    return path


@pytest.mark.parametrize("values, dtype, expected", [
    ([0, 0.5, 1], np.float32, [0, 128, 255]),
    ([-0.02, 0.5, 1.02], np.float32, [0, 128, 255]),  # bicubic resampling overshoots
    ([0, 0, 0], np.float32, [0, 0, 0]),
    ([0, 100, 255], np.float32, [0, 100, 255]),
    ([0, 32896, 65535], np.float32, [0, 128, 255]),
    ([0, 1e6, 4e6], np.float32, [0, 64, 255]),
    ([-1e30, 0, 1e30], np.float32, [0, 128, 255]),
    ([0, 100, 255], np.int32, [0, 100, 255]),
    ([0, 32896, 65535], np.int32, [0, 128, 255]),
    ([0, 50_000, 100_000], np.int32, [0, 128, 255]),
    ([0, 2**30, 2**31 - 1], np.int32, [0, 128, 255]),
    ([0, 2**31, 2**32 - 1], np.uint32, [0, 128, 255]),
])
def test_grey_values_are_scaled_by_their_range(tmp_path, values, dtype, expected):
    image = open_image(tiff(tmp_path, values, dtype))
    assert np.asarray(image)[0].tolist() == [[value] * 3 for value in expected]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_an_error(tmp_path, value):
    with pytest.raises(UserError, match="--img .*values.tif: cannot be read .not all of its values are finite"):
        open_image(tiff(tmp_path, [0, value, 1], np.float32))


def test_a_hint_of_floats_is_an_outline():
    pixels = np.asarray(open_image(FAULTS / "hint_F01.tif", "--control_image"))
    assert pixels.min() == 0 and pixels.max() == 255 and 0.01 < (pixels > 127).mean() < 0.2


@pytest.mark.parametrize("mode", ["CMYK", "P", "L", "1", "LA"])
def test_other_modes(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new("RGB", (3, 3), "white").convert(mode).save(path)
    opened = open_image(path)
    assert opened.mode == "RGB" and np.asarray(opened).min() >= 253


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("blue", "green")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "moving.gif").getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "TGA", "AVIF", "MPO"])
def test_formats_people_have(tmp_path, kind):
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip("this Pillow cannot write it")
    image, more = Image.new("RGB", (16, 8), "white"), {"save_all": True} if kind == "MPO" else {}
    image.save(tmp_path / "image", kind, **more)
    assert np.asarray(open_image(tmp_path / "image")).min() > 250


def test_ghostscript_is_not_started(tmp_path, monkeypatch):
    from PIL import EpsImagePlugin
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("Ghostscript"))
    Image.new("RGB", (4, 4)).save(tmp_path / "drawing.png", "EPS")
    with pytest.raises(UserError, match="drawing.png: is not an image of a known format; expected PNG, JPEG, WEBP"):
        open_image(tmp_path / "drawing.png")


def test_file_names_are_bytes(tmp_path):
    path = os.fsdecode(bytes(tmp_path) + b"/caf\xe9.png")
    Image.new("RGB", (3, 3)).save(path)
    assert open_image(path).size == shown_size(path) == (3, 3)
    open(path, "wb").close()
    with pytest.raises(UserError, match="caf\ufffd.png: the file is empty; expected an image"):
        open_image(path)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, expected in ((tmp_path / "pipe", "not a regular file"), ("/dev/zero", "not a regular file"),
                           (tmp_path, "is a folder"), ("a\0b", "cannot be opened"), ("x" * 5000, "cannot be opened"),
                           (tmp_path / "half \ud83d.png", "cannot be opened")):
        with pytest.raises(UserError, match=f"--img .*{expected}"):
            open_image(path)


def whole_clip_pixels(image: Image.Image, size: int) -> np.ndarray:
    """`clip_pixels` as it is defined, whatever memory it takes."""
    scaled = [int(size * side / min(image.size)) for side in image.size]
    left, top = ((side - size) // 2 for side in scaled)
    pixels = np.asarray(image.resize(scaled, Image.BICUBIC).crop((left, top, left + size, top + size)), np.float32)
    return ((pixels / 255 - CLIP_MEAN) / CLIP_STD).transpose(2, 0, 1)


@pytest.mark.parametrize("size", [(64, 64), (333, 500), (1000, 37), (7, 699), (2, 200), (1, 100), (224, 225)])
def test_clip_pixels_are_exact(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))
    np.testing.assert_array_equal(clip_pixels(image, 56), whole_clip_pixels(image, 56))


@pytest.mark.parametrize("size", [(1, 5000), (4001, 2), (3, 900)])
def test_of_a_line_the_middle_is_taken(size):
    smooth = np.linspace(0, 255, max(size)).astype(np.uint8)[:, None].repeat(min(size), 1)
    image = Image.fromarray(smooth if size[0] > size[1] else smooth.T).convert("RGB")
    step = 1 / 255 / CLIP_STD.min()  # one of 255
    np.testing.assert_allclose(clip_pixels(image, 56), whole_clip_pixels(image, 56), atol=1.01 * step)


def test_a_long_line_takes_little_memory():
    program = ("import sys; sys.path.insert(0, sys.argv[1])\nfrom PIL import Image\n"
               "from ip_adapter.images.preprocess import clip_pixels\nimport resource\n"
               "limit = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize() + (1 << 30)\n"
               "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
               "for size in ((1, 65000), (65000, 1)):\n"
               "    assert clip_pixels(Image.new('RGB', size)).shape == (3, 224, 224)")
    assert subprocess.run([sys.executable, "-c", program, ROOT], timeout=60).returncode == 0


def test_one_pixel_wide_and_odd_names(tmp_path):
    path = tmp_path / "ein Bild 图 🎨.png"
    Image.new("RGB", (1, 300), "green").save(path)
    pixels = clip_pixels(open_image(path))
    assert pixels.shape == (3, 224, 224) and pixels.dtype == np.float32


@pytest.mark.parametrize("content, message", [
    (b"", "is empty"), (b"no picture at all", "is not an image of a known format"), (None, "no such file"),
    ("truncated", "truncated")])
def test_what_is_not_a_picture(tmp_path, content, message):
    path = tmp_path / "bad.png"
    if content == "truncated":
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:3000])
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        open_image(path, "--ref_img")
    assert str(error.value).startswith(f"--ref_img {path}")


def test_absurd_sizes_are_refused_before_they_take_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(preprocess, "MAX_PIXELS", 100)
    Image.new("RGB", (11, 10)).save(tmp_path / "large.png")
    with pytest.raises(UserError, match="11 x 10 pixels"):
        open_image(tmp_path / "large.png")
