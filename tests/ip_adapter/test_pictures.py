"""Pictures that are written: names, metadata, grids, fingerprints."""
from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from ip_adapter.pictures import file_sha256, grid, save_png
from ldm.errors import UserError


def test_nothing_is_overwritten_by_several_writers(tmp_path):
    (tmp_path / "00004.png").write_bytes(b"mine")
    with ThreadPoolExecutor(8) as pool:
        pictures = [Image.new("RGB", (2, 2), (i, 0, 0)) for i in range(40)]
        paths = list(pool.map(lambda picture: save_png(tmp_path, picture, {}), pictures))
    assert len(set(paths)) == 40 and (tmp_path / "00004.png").read_bytes() == b"mine"
    assert sorted(Image.open(path).getpixel((0, 0))[0] for path in paths) == list(range(40))
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_settings_travel_in_the_file(tmp_path):
    path = save_png(tmp_path / "new folder", Image.new("RGB", (2, 2)), {"prompt": "ein Hund 犬 🐶", "seed": 7})
    assert Image.open(path).text == {"prompt": "ein Hund 犬 🐶", "seed": "7"}
    assert path.name == "00000.png"


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output_path .*cannot write"):
        save_png(tmp_path / "file", Image.new("RGB", (2, 2)), {})


def test_grid_has_the_inputs_on_the_left():
    pictures = np.full((2, 8, 16, 3), 9, np.uint8)
    result = np.asarray(grid([Image.new("RGB", (10, 10), "red")], pictures))
    assert result.shape == (8, 48, 3)
    assert result[4, [8, 0, 20]].tolist() == [[255, 0, 0], [255, 255, 255], [9, 9, 9]]


def test_the_fingerprint_is_remembered_and_renewed(tmp_path):
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"one")
    assert file_sha256(path) == hashlib.sha256(b"one").hexdigest()
    note = tmp_path / "model.ckpt.sha256"
    assert note.read_text() == f"{hashlib.sha256(b'one').hexdigest()}  model.ckpt\n"
    path.write_bytes(b"two")
    os.utime(path, (note.stat().st_mtime + 10,) * 2)
    assert file_sha256(path) == hashlib.sha256(b"two").hexdigest()
