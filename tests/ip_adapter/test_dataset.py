"""Training data: each row once an epoch whatever the batch and devices, randomness by position, odd files, threads."""
from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from ip_adapter.dataset import Batch, ImageTextDataset, Loader, Stream, draws, samples_of
from ip_adapter.preprocess import clip_pixels, open_image
from ldm.errors import UserError

SHAPES = [(1, 1, 1), (1, 3, 2), (5, 8, 1), (7, 2, 1), (7, 3, 2), (10, 5, 2), (12, 4, 3), (100, 7, 1), (3, 20, 2)]


def write_csv(folder, text: str, name: str = "img_txt.csv"):
    (folder / name).write_bytes(text.encode())
    return folder


@pytest.fixture
def six(tmp_path):
    """Six pictures of 40 x 30 of one grey each, and captions; the third and fourth cannot be read."""
    for i in range(6):
        Image.new("RGB", (40, 30), (40 * i,) * 3).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").unlink()
    (tmp_path / "3.png").write_bytes(b"not a picture")
    return write_csv(tmp_path, "dir,text\n" + "".join(f"{i}.png,picture {i}\n" for i in range(6)))


def epochs_of(length, batch, ranks, seed=3, epochs=3):
    """The rows of all ranks in the order of their positions, epoch by epoch."""
    streams = [Stream(length, batch, seed, ranks, rank) for rank in range(ranks)]
    steps = range(-(-length * epochs // (batch * ranks)))
    rows = np.concatenate([stream.rows(step) for step in steps for stream in streams])
    return rows[:length * epochs].reshape(epochs, length)


@pytest.mark.parametrize("length, batch, ranks", SHAPES)
def test_each_row_once_an_epoch(length, batch, ranks):
    for rows in epochs_of(length, batch, ranks):
        assert sorted(rows) == list(range(length))


@pytest.mark.parametrize("length, batch, ranks", SHAPES)
def test_devices_and_batches_do_not_change_the_order(length, batch, ranks):
    assert np.array_equal(epochs_of(length, batch, ranks), epochs_of(length, 1, 1))


def test_two_ranks_see_what_one_with_twice_the_batch_sees():
    one, two = Stream(11, 6, 0), [Stream(11, 3, 0, 2, rank) for rank in range(2)]
    for step in (0, 1, 2, 5, 1000):
        assert np.array_equal(one.positions(step), np.concatenate([stream.positions(step) for stream in two]))
        assert np.array_equal(one.rows(step), np.concatenate([stream.rows(step) for stream in two]))


def test_resuming_needs_the_step_only():
    whole = Stream(13, 4, 5)
    rows = [whole.rows(step) for step in range(20)]
    for step in (0, 3, 4, 19):
        assert np.array_equal(Stream(13, 4, 5).rows(step), rows[step])
    assert np.array_equal(whole.rows(2), rows[2])  # going back, after the first epochs have left the cache


def test_epochs_and_seeds_differ_and_repeat():
    epochs = epochs_of(50, 5, 1)
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])
    assert np.array_equal(epochs, epochs_of(50, 5, 1)) and not np.array_equal(epochs, epochs_of(50, 5, 1, seed=4))


def test_positions_and_the_order_without_shuffling():
    stream = Stream(5, 2, 0, 2, 1, shuffle=False)
    assert stream.positions(3).tolist() == [14, 15] and stream.positions(3).dtype == np.int64
    assert stream.rows(3).tolist() == [4, 0] and stream.rows(3).dtype == np.int64


def test_a_permutation_is_drawn_once_an_epoch(monkeypatch):
    drawn, default_rng = [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: drawn.append(seed[1]) or default_rng(seed))
    stream = Stream(10, 4, 0)
    for step in range(10):
        stream.rows(step)
    assert drawn == [0, 1, 2, 3]


def test_drops_are_five_percent_each_and_timesteps_uniform():
    samples = [draws(0, position, (1, 1, 1)) for position in range(20_000)]
    sigma = np.sqrt(20_000 * 0.05 * 0.95)
    for drops in ((True, False), (False, True), (True, True)):
        assert abs(sum((s.drop_image, s.drop_text) == drops for s in samples) - 1000) < 3 * sigma
    timesteps = np.array([s.timestep for s in samples])
    assert timesteps.min() == 0 and timesteps.max() == 999
    assert abs(timesteps.mean() - 499.5) < 3 * 288.7 / np.sqrt(20_000)


@pytest.mark.parametrize("p, drops", [((1, 0, 0), (True, False)), ((0, 1, 0), (False, True)), ((0, 0, 1), (True, True)),
                                      ((0, 0, 0), (False, False))])
def test_what_is_dropped(p, drops):
    assert all(draws(1, k, (1, 1, 1), *p)[3:] == drops for k in range(50))


def test_draws_depend_on_seed_and_position_only():
    a, b = draws(7, 12, (4, 8, 8)), draws(7, 12, (4, 8, 8))
    assert a[0] == b[0] and a[3:] == b[3:] and all(np.array_equal(x, y) for x, y in zip(a[1:3], b[1:3]))
    assert a.noise.shape == a.posterior.shape == (4, 8, 8) and a.noise.dtype == a.posterior.dtype == np.float32
    noises = [a.noise, a.posterior, draws(7, 13, (4, 8, 8)).noise, draws(8, 12, (4, 8, 8)).noise]
    assert all(abs(np.corrcoef(x.ravel(), y.ravel())[0, 1]) < 0.25 for i, x in enumerate(noises) for y in noises[:i])


def test_timestep_and_drops_do_not_depend_on_the_size_of_the_noise():
    for position in range(100):
        small, large = draws(2, position, (4, 2, 2)), draws(2, position, (4, 16, 8))
        assert small.timestep == large.timestep and small[3:] == large[3:]
        assert np.array_equal(small.noise.ravel(), large.noise.ravel()[:16])


def test_odd_csv_files(tmp_path):
    write_csv(tmp_path, '\ufeffid,dir,extra,text\r\n1,a b.jpg,,"a dog, ""Rex"", runs"\r\n2,图/🎨.png,x,中文 🎨 é\r\n'
                        '\r\n3,c.jpg,,\r\n4,d.jpg\r\n5,e.jpg,,NA\r\n6,f.jpg,,"two\r\nlines"\r\n')
    dataset = ImageTextDataset(tmp_path, 8)
    assert [dataset.text(i) for i in range(len(dataset))] == [
        'a dog, "Rex", runs', "中文 🎨 é", "", "", "NA", "two\r\nlines"]
    assert [dataset.path(i).relative_to(tmp_path).as_posix() for i in range(3)] == ["a b.jpg", "图/🎨.png", "c.jpg"]


def test_a_csv_file_of_another_name(tmp_path):
    (tmp_path / "sub").mkdir()
    write_csv(tmp_path / "sub", "text,dir\nx,p.png\n", "part 1.CSV")
    assert ImageTextDataset(tmp_path / "sub" / "part 1.CSV", 8).path(0) == tmp_path / "sub" / "p.png"


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
    assert [record.getMessage() for record in caplog.records] == [
        f"skipped: --data_path, row 4: {six / '3.png'}: is not a picture; expected PNG, JPEG, WebP, ...",
        f"skipped: --data_path, row 3: {six / '2.png'}: no such file; give the path of a picture"]
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


def threads() -> list:
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_batches_equal_plain_computation(six):
    stream, make = Stream(6, 4, 1), samples_of(ImageTextDataset(six, 16, random_crop=True), 1)
    with Loader(stream, make, start=5, workers=3) as loader:
        for step, batch in zip(range(5, 9), loader):
            positions, rows = stream.positions(step), stream.rows(step)
            samples = [make(row, position) for row, position in zip(rows, positions)]
            assert isinstance(batch, Batch) and batch.step == step and np.array_equal(batch.positions, positions)
            assert np.array_equal(batch.pixels, [sample.pixels for sample in samples])
            assert np.array_equal(batch.clip_pixels, [sample.clip_pixels for sample in samples])
            assert batch.pixels.dtype == batch.clip_pixels.dtype == np.float32
            assert batch.texts == [sample.text for sample in samples]
            assert batch.rows.tolist() == [sample.index for sample in samples]
            assert batch.sizes.tolist() == [[30, 40, *sample.crop, *sample.pixels.shape[1:]] for sample in samples]


def numbers(step, positions, samples) -> tuple:
    return step, samples


def test_batches_come_in_order_however_long_each_sample_takes():
    def make(row, position):
        time.sleep(0.01 * (position % 3 == 0))
        return row
    with Loader(Stream(10, 4, 0), make, workers=4, collate=numbers) as loader:
        for expected, (step, rows) in zip(range(12), loader):
            assert step == expected and rows == Stream(10, 4, 0).rows(step).tolist()
    assert not threads()


def test_few_batches_are_made_ahead():
    made = []
    with Loader(Stream(10, 2, 0), lambda row, position: made.append(position), ahead=3, collate=numbers) as loader:
        for _ in loader:
            time.sleep(0.1)
            assert sorted(made) == list(range(8))  # the batch in use and three more
            break


def test_an_exception_is_raised_when_its_batch_is_due():
    def make(row, position):
        if position == 5:
            raise UserError("the sixth")
        return position
    seen = []
    with pytest.raises(UserError, match="the sixth"):
        for step, samples in Loader(Stream(10, 2, 0), make, collate=numbers):
            seen += samples
    assert seen == [0, 1, 2, 3] and not threads()


@pytest.mark.parametrize("exception", [KeyboardInterrupt, None])
def test_stopping_early_leaves_no_thread(exception):
    started = []

    def make(row, position):
        started.append(position)
        time.sleep(0.02)
    begun = time.perf_counter()
    try:
        with Loader(Stream(10, 50, 0), make, ahead=4, collate=numbers) as loader:
            for _ in loader:
                assert threads()
                if exception:
                    raise exception
                break
    except KeyboardInterrupt:
        assert exception
    assert not threads()
    assert len(started) < 60 and time.perf_counter() - begun < 2  # of the 250 that were asked for


def test_leaving_the_loop_closes_the_loader():
    for _ in Loader(Stream(10, 2, 0), lambda row, position: row, collate=numbers):
        break
    assert not threads()
