"""Training data: odd CSV files, broken pictures, what is cut out, and many rows."""
from __future__ import annotations

import logging
import os
import resource
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from ip_adapter.data.dataset import ImageTextDataset
from ip_adapter.data.feature_cache import sample_key
from ip_adapter.images.preprocess import clip_pixels, open_image
from ldm.errors import UserError
from tests.support.dummies import write_csv


def test_odd_csv_files(tmp_path):
    write_csv(tmp_path, '\ufeffid,dir,extra,text\r\n1,a b.jpg,,"a dog, ""Rex"", runs"\r\n2,图/🎨.png,x,中文 🎨 é\r\n'
                        '\r\n3,c.jpg,,\r\n4,d.jpg\r\n5,e.jpg,,NA\r\n6,f.jpg,,"two\r\nlines"\r\n')
    dataset = ImageTextDataset(tmp_path, 8)
    assert [dataset.text(i) for i in range(len(dataset))] == [
        'a dog, "Rex", runs', "中文 🎨 é", "", "", "NA", "two\r\nlines"]
    assert [dataset.path(i).relative_to(tmp_path).as_posix() for i in range(3)] == ["a b.jpg", "图/🎨.png", "c.jpg"]


def test_odd_captions(tmp_path):
    """Half an emoji, as a pair of halves too; NUL; other line ends; a text of a megabyte; bytes lost in a crash."""
    long = "long " * 200_000
    captions = ["half \ud83d", "whole \ud83d\ude00", "a\0b", "two\u2028lines\u0085\x0b", long, "\x1b[31mred"]
    rows = "".join(f"a.png,{text}\n" for text in captions) + "\0" * 5000
    (tmp_path / "img_txt.csv").write_bytes(f"dir,text\n{rows}".encode(errors="surrogatepass"))
    dataset = ImageTextDataset(tmp_path, 8)
    assert [dataset.text(i) for i in range(len(dataset))] == [
        "half \ufffd", "whole \U0001f600", "ab", "two\u2028lines\u0085\x0b", long, "\x1b[31mred"]


def test_a_csv_file_of_another_name(tmp_path):
    (tmp_path / "sub").mkdir()
    write_csv(tmp_path / "sub", "text,dir\nx,p.png\n", "part 1.CSV")
    assert ImageTextDataset(tmp_path / "sub" / "part 1.CSV", 8).path(0) == tmp_path / "sub" / "p.png"


def test_a_row_may_name_another_picture_as_its_prompt(tmp_path):
    for name, grey in (("a.png", 40), ("b.png", 200)):
        Image.new("RGB", (16, 16), (grey,) * 3).save(tmp_path / name)
    write_csv(tmp_path, "dir,text,image_prompt\na.png,x,b.png\na.png,x,\na.png,x\na.png,y,none.png\n")
    dataset = ImageTextDataset(tmp_path, 16)
    samples = [dataset.sample(row, None) for row in range(4)]
    assert [sample.index for sample in samples] == [0, 1, 2, 0]  # the last one's prompt is not there
    assert all(np.allclose(sample.pixels, 40 / 127.5 - 1) for sample in samples)
    a, b = (clip_pixels(open_image(tmp_path / name)) for name in ("a.png", "b.png"))
    assert all(np.array_equal(sample.clip_pixels, prompt) for sample, prompt in zip(samples, (b, a, a, b)))
    assert dataset.prompt(0).getpixel((0, 0)) == (200,) * 3 and dataset.prompt(1).getpixel((0, 0)) == (40,) * 3
    keys = [sample_key(dataset, row) for row in range(4)]  # of what a feature cache keeps
    assert keys[1] == keys[2] and len(set(keys)) == 3
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    assert sample_key(dataset, 0) not in keys


@pytest.mark.parametrize("content, message", [
    (b"", "is empty; expected the columns dir,text"),
    (b"dir,text\n", "none of its 0 rows names a picture"),
    (b"dir,text\n,a\n,b\n", "none of its 2 rows names a picture"),
    (b"image,caption\na,b\n", "has the columns 'image', 'caption'; expected dir,text"),
    (b"dir\ttext\na\tb\n", "has the columns 'dir\\ttext'"),
    (b"dir\na.jpg\n", "has the columns 'dir'; expected dir,text"),
    (b"dir,text\na.jpg,a dog, a cat\n", "line 2 has 3 fields, expected 2; put captions with commas in"),
    (b"dir,text\na.jpg,x\nb.jpg,a dog, a cat\n", "line 3 has 3 fields, expected 2"),
    (b'dir,text\na.jpg,"open\n', "unexpected end of data"),
    (b"dir,text\na.jpg,\xc4\xe3\n", "can't decode byte 0xc4 in position 15"),
])
def test_csv_files_that_cannot_be_used(tmp_path, content, message):
    (tmp_path / "img_txt.csv").write_bytes(content)
    with pytest.raises(UserError) as error:
        ImageTextDataset(tmp_path, 8, flag="--train_data")
    assert str(error.value).startswith(f"--train_data {tmp_path / 'img_txt.csv'}: ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_paths_that_hold_no_csv_file(tmp_path, picture):
    (tmp_path / "empty").mkdir()
    for path, message in ((tmp_path / "none", "no such file or folder"), (picture, "neither a folder nor a .csv file"),
                          (tmp_path / ("x" * 300), "no such file or folder"),
                          (tmp_path / "empty", "holds no img_txt.csv")):
        with pytest.raises(UserError) as error:
            ImageTextDataset(path, 8)
        assert str(error.value) == (
            f"--data_path {path}: {message}; give a folder with pictures and img_txt.csv, or a .csv file")


def test_broken_pictures_are_replaced_by_the_next(six, caplog):
    dataset = ImageTextDataset(six, 16)
    rng = np.random.default_rng(0)
    with caplog.at_level(logging.WARNING):
        assert [dataset.sample(i, rng).index for i in (3, 2, 2, 1, 4)] == [4, 4, 4, 1, 4]
    no_image, no_file = (record.getMessage() for record in caplog.records)
    assert no_image.startswith(f"skipped: --data_path, row 4: {six / '3.png'}: is not an image of a known format; ")
    assert no_file == (f"skipped: --data_path, row 3: {six / '2.png'}: no such file; expected an image (PNG, JPEG, "
                       "WebP, ...)")
    sample = dataset.sample(2, rng)
    assert sample.text == "picture 4" and np.allclose(sample.pixels, 160 / 127.5 - 1)


def test_a_broken_picture_is_reported_once_and_not_opened_again(six, caplog, monkeypatch):
    dataset, meet, opened = ImageTextDataset(six, 16), threading.Barrier(2, timeout=10), []

    def picture(i):
        opened.append(i)
        if i == 3:
            meet.wait()  # two threads find it broken at the same time
        return open_image(dataset.path(i))
    monkeypatch.setattr(dataset, "picture", picture)
    with ThreadPoolExecutor(2) as pool, caplog.at_level(logging.WARNING):
        samples = list(pool.map(lambda seed: dataset.sample(3, np.random.default_rng(seed)), range(2)))
    assert [sample.index for sample in samples] == [4, 4] and len(caplog.records) == 1
    assert dataset.sample(3, np.random.default_rng(0)).index == 4 and opened.count(3) == 2


def test_the_search_wraps_round(six):
    (six / "4.png").unlink()
    (six / "5.png").unlink()
    assert ImageTextDataset(six, 16).sample(2, np.random.default_rng(0)).index == 0


def test_the_number_of_broken_pictures_is_limited(six):
    dataset = ImageTextDataset(six, 16, max_broken=1)
    assert dataset.sample(3, np.random.default_rng(0)).index == 4
    with pytest.raises(UserError, match="2 pictures cannot be read, more than --max_broken 1; .* the last: .*2.png"):
        dataset.sample(2, np.random.default_rng(0))


def test_no_picture_can_be_read(tmp_path):
    long = "x" * 5000  # longer than a file system takes
    write_csv(tmp_path, f'dir,text\na.jpg,x\n{long},y\n"",z\n')
    with pytest.raises(UserError, match="none of its 3 pictures can be read"):
        ImageTextDataset(tmp_path, 16).sample(1, np.random.default_rng(0))


def test_rows_that_name_no_image_are_skipped_and_not_waited_for(six):
    """A pipe, a device, a folder, half an emoji, a line of pixels; 4.png is the first row that can be read."""
    os.mkfifo(six / "pipe.png")
    (six / "folder.png").mkdir()
    Image.new("RGB", (1, 65000)).save(six / "thin.png")
    names = ["pipe.png", "/dev/zero", "folder.png", "half \ud83d.png", "a\0b.png", "thin.png", "4.png"]
    rows = "".join(f"{name},caption {n}\n" for n, name in enumerate(names))
    (six / "img_txt.csv").write_bytes(f"dir,text\n{rows}".encode(errors="surrogatepass"))
    dataset = ImageTextDataset(six, 16)
    assert [dataset.sample(row, None).index for row in range(7)] == [6] * 7
    assert len({sample_key(dataset, row) for row in range(7)}) == 7


def test_lines_of_pixels_are_left_out_counted_and_cheap(six, caplog):
    """As samples and as squares, for which the demo model's parts ask; a third of them is one too many."""
    for name, size in (("0.png", (1, 5000)), ("1.png", (65000, 1)), ("2.png", (1, 65000)), ("3.png", (40, 30))):
        Image.new("RGB", size).save(six / name)
    dataset = ImageTextDataset(six, 512, max_broken=2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert dataset.sample(1, None).index == 3
    assert "0.png" not in caplog.text and caplog.text.count("pixels are too narrow") == 2
    assert dataset.square(2, 16).size == (16, 16)
    with pytest.raises(UserError, match="3 pictures cannot be read, more than --max_broken 2; .* the last: .*0.png"):
        dataset.square(0, 16)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes


def test_a_square_is_what_a_sample_has(six):
    dataset = ImageTextDataset(six, 16)
    pixels = np.asarray(dataset.square(2, 16), np.float32).transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_array_equal(pixels, dataset.sample(2, None).pixels)
    assert pixels[0, 0, 0] == pytest.approx(160 / 127.5 - 1)  # that of row 4


def test_a_prompt_may_be_a_line_of_pixels(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    Image.new("RGB", (1, 65000)).save(tmp_path / "thin.png")
    write_csv(tmp_path, "dir,text,image_prompt\na.png,x,thin.png\n")
    assert ImageTextDataset(tmp_path, 16).sample(0, None).clip_pixels.shape == (3, 224, 224)


def test_a_picture_too_narrow_is_broken(tmp_path):
    Image.new("RGB", (1, 60_000)).save(tmp_path / "line.png")
    write_csv(tmp_path, "dir,text\nline.png,x\n")
    with pytest.raises(UserError, match="too narrow, resized they would be 512 x 30720000"):
        ImageTextDataset(tmp_path, 512, max_broken=0).sample(0, np.random.default_rng(0))


@pytest.fixture
def coloured(tmp_path):
    """A picture of 90 x 60 whose red grows to the right by 2 a pixel and whose green grows downwards by 4."""
    pixels = np.zeros((60, 90, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = 2 * np.arange(90), 4 * np.arange(60)[:, None]
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown after a quarter turn
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    return write_csv(tmp_path, "dir,text\nwide.png,wide\nturned.png,turned\n"), pixels


def test_a_centre_crop(coloured):
    folder, pixels = coloured
    sample = ImageTextDataset(folder, 60).sample(0, np.random.default_rng(0))
    assert sample.pixels.shape == (3, 60, 60) and sample.pixels.dtype == np.float32
    assert (sample.original_size, sample.crop, sample.text, sample.index) == ((60, 90), (0, 15), "wide", 0)
    assert np.allclose(sample.pixels, pixels[:, 15:75].transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
    assert np.array_equal(sample.clip_pixels, clip_pixels(open_image(folder / "wide.png")))
    assert sample.clip_pixels.shape == (3, 224, 224)


def test_the_shortest_edge_is_resized(coloured):
    sample = ImageTextDataset(coloured[0], 20).sample(0, np.random.default_rng(0))
    assert sample.crop == (0, 5) and sample.original_size == (60, 90)
    grey = (sample.pixels + 1) * 127.5
    assert np.allclose(grey[0, 10], 2 * (3 * (5 + np.arange(20)) + 1), atol=1)  # the middle of three columns
    assert np.allclose(grey[1, 1:-1, 10], 4 * (3 * np.arange(20) + 1)[1:-1], atol=1)


def test_exif_rotation(coloured):
    folder, pixels = coloured
    sample = ImageTextDataset(folder, 60).sample(1, np.random.default_rng(0))
    assert (sample.original_size, sample.crop) == ((90, 60), (15, 0))
    turned = np.rot90(pixels, -1)
    assert np.allclose(sample.pixels, turned[15:75].transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)


def test_random_crops_lie_where_they_say(coloured):
    folder, pixels = coloured
    dataset = ImageTextDataset(folder, 60, random_crop=True)
    crops = set()
    for seed in range(200):
        sample = dataset.sample(0, np.random.default_rng(seed))
        top, left = sample.crop
        crops.add(left)
        assert top == 0 and np.allclose(sample.pixels[0, 0], pixels[0, left:left + 60, 0] / 127.5 - 1, atol=1e-6)
    assert min(crops) == 0 and max(crops) == 30


def test_a_hundred_thousand_rows_start_quickly(tmp_path):
    rows = "".join(f"{i // 1000:03d}/{i:09d}.jpg,a photo of number {i} on the beach\n" for i in range(100_000))
    write_csv(tmp_path, "dir,text\n" + rows)
    begun = time.perf_counter()
    dataset = ImageTextDataset(tmp_path, 512)
    assert time.perf_counter() - begun < 2
    assert len(dataset) == 100_000 and dataset.text(99_999) == "a photo of number 99999 on the beach"
