"""Odd but fine pictures, and what is not a picture."""
from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import ip_adapter.preprocess as preprocess
from ip_adapter.preprocess import clip_pixels, open_image
from ldm.errors import UserError


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (20, 40)


def test_transparency_shows_white(tmp_path):
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    image.save(tmp_path / "clear.png")
    assert np.asarray(open_image(tmp_path / "clear.png")).tolist() == [[[255, 255, 255], [10, 20, 30]]]


def test_16_bits_are_scaled_not_cut(tmp_path):
    Image.fromarray(np.array([[0, 32896, 65535]], np.uint16)).save(tmp_path / "deep.png")
    assert np.asarray(open_image(tmp_path / "deep.png"))[0, :, 0].tolist() == [0, 128, 255]


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


def test_one_pixel_wide_and_odd_names(tmp_path):
    path = tmp_path / "ein Bild 图 🎨.png"
    Image.new("RGB", (1, 300), "green").save(path)
    pixels = clip_pixels(open_image(path))
    assert pixels.shape == (3, 224, 224) and pixels.dtype == np.float32


@pytest.mark.parametrize("content, message", [
    (b"", "is empty"), (b"no picture at all", "not a picture"), (None, "no such file"), ("truncated", "truncated")])
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
