"""tools/prepare_coco.py: what it writes is what the data set reads, and mistakes are one line."""
from __future__ import annotations

import json
import os
import stat

import pytest
from PIL import Image

from ip_adapter.data.dataset import ImageTextDataset
from tests.support.arrays import DATA
from tests.support.scripts import shell
from tools.prepare_coco import main

CAPTIONS = ["A man, with a \"hat\".\n", "  two\nlines ", "a 'cat'", "日本の猫", "of a picture that is not there"]


@pytest.fixture
def coco(tmp_path):
    """A label file and a folder, in which one picture is missing."""
    folder = tmp_path / "train2017"
    folder.mkdir()
    for n in (9, 25):
        Image.new("RGB", (8, 8), (n, 0, 0)).save(folder / f"{n:012d}.jpg")
    label = {"images": [{"id": n, "file_name": f"{n:012d}.jpg", "height": 8, "width": 8} for n in (25, 9, 30)],
             "annotations": [{"image_id": n, "id": k, "caption": text}
                             for k, (n, text) in enumerate(zip((9, 25, 9, 25, 30), CAPTIONS))]}
    path = tmp_path / "captions_train2017.json"
    path.write_text(json.dumps(label))
    return path, folder


def test_every_caption_is_a_row_that_the_data_set_reads(coco, outcome):
    label, folder = coco
    status, said = outcome(main, "--label", label, "--image", folder)
    assert status == 0 and f"4 captions of 2 images written into {folder / 'img_txt.csv'}" in said
    assert "1 left out, their image is not in the folder; there is no 000000000030.jpg, for one" in said
    dataset = ImageTextDataset(folder, 8)
    texts = [dataset.text(n) for n in range(len(dataset))]
    assert texts == ['A man, with a "hat".', "two lines", "a 'cat'", "日本の猫"]
    assert [dataset.path(n).name for n in range(4)] == [f"{n:012d}.jpg" for n in (9, 25, 9, 25)]
    assert dataset.picture(0).size == (8, 8)
    assert {path.suffix for path in folder.iterdir()} == {".jpg", ".csv"}


def test_from_the_shell_to_another_place(coco, tmp_path):
    label, folder = coco
    result = shell("python", "tools/prepare_coco.py", "--label", label, "--image", folder, "--out",
                   tmp_path / "here.csv", cwd=".")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "here.csv").read_text(encoding="utf-8").splitlines()[0] == "dir,text"
    assert not (folder / "img_txt.csv").exists()


def test_odd_rows_are_left_out_or_mended_and_counted(coco, outcome):
    label, folder = coco
    content = json.loads(label.read_text())
    content["images"] += [None, {"id": [1], "file_name": "a.jpg"}, {"id": 40, "file_name": ["a.jpg"]}, {"id": 41},
                          {"id": {}, "file_name": {}}, {"file_name": "000000000009.jpg"},
                          {"id": 42, "file_name": "train2017/000000000009.jpg"},
                          {"id": 43, "file_name": "train2017\\000000000025.jpg"},
                          {"id": 44, "file_name": "half \ud83d.jpg"}, {"id": 45, "file_name": ""},
                          {"id": 46, "file_name": "deeper/b.jpg"}]
    content["annotations"] += [
        {"image_id": 9, "caption": None}, {"image_id": 9}, {"image_id": 25, "caption": ["a"]}, None, [],
        {"image_id": 99, "caption": "stray"}, {"image_id": [9], "caption": "list"}, {"caption": "no image"},
        {"image_id": 40, "caption": "x"}, {"image_id": 41, "caption": "x"}, {"image_id": 42, "caption": "in a folder"},
        {"image_id": 43, "caption": "in a folder of Windows"}, {"image_id": 9, "caption": "half \ud83d"},
        {"image_id": 44, "caption": "x"}, {"image_id": 45, "caption": "x"}, {"image_id": 46, "caption": "deeper"},
        {"image_id": 9.0, "caption": ""}]
    (folder / "deeper").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "deeper" / "b.jpg")
    label.write_bytes(b"\xef\xbb\xbf" + json.dumps(content).encode())
    status, said = outcome(main, "--label", label, "--image", folder)
    assert status == 0 and "9 captions of 3 images" in said, said
    assert said.strip().splitlines()[-1] == (
        "odd captions: 1 mended, with half a character; 5 left out, without a text; 5 left out, of an image without a "
        "name; 3 left out, their image is not in the folder; there is no 000000000030.jpg, for one")
    dataset = ImageTextDataset(folder, 8)
    assert [dataset.text(n) for n in range(4, 9)] == [
        "in a folder", "in a folder of Windows", "half \ufffd", "deeper", ""]
    assert all(dataset.picture(n).size == (8, 8) for n in range(len(dataset)))


def test_half_an_emoji(tmp_path, outcome):
    for n in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{n}.jpg")
    status, said = outcome(main, "--label", DATA / "faults" / "coco_lone_surrogate.json", "--image", tmp_path)
    assert status == 0 and "odd captions: 1 mended, with half a character" in said
    assert (tmp_path / "img_txt.csv").read_text(encoding="utf-8") == "dir,text\n0.jpg,c0\n1.jpg,\ufffd\n2.jpg,c2\n"


def test_the_file_is_whole_and_has_the_users_permissions(coco, outcome, monkeypatch):
    label, folder = coco
    before = os.umask(0o027)
    try:
        assert outcome(main, "--label", label, "--image", folder)[0] == 0
    finally:
        os.umask(before)
    written = folder / "img_txt.csv"
    old = written.read_text()
    assert stat.S_IMODE(written.stat().st_mode) == 0o640

    def fail(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", fail)
    status, said = outcome(main, "--label", label, "--image", folder)
    assert status == 2 and "img_txt.csv: cannot be written (No space left on device); free some space" in said
    assert written.read_text() == old and len(list(folder.iterdir())) == 3


@pytest.mark.parametrize("content, expected", [
    ("{", "not what was expected"), ("[]", "not what was expected"), ("{}", "no 'images'"),
    ("[" * 100_000, "not what was expected"), ('{"images": 3, "annotations": {}}', "not what was expected"),
    ('{"images": [], "annotations": []}', "holds no captions that can be used (0 in all)"),
    ('{"images": [], "annotations": [{"image_id": 3, "caption": ""}]}', "(1 left out, of an image without a name)"),
    ('{"images": [{"id": 1, "file_name": "b.jpg"}], "annotations": [{"image_id": 1, "caption": "b"}]}',
     "holds none of the images that")])
def test_mistakes(coco, tmp_path, outcome, content, expected):
    _, folder = coco
    label = tmp_path / "label.json"
    label.write_text(content)
    status, said = outcome(main, "--label", label, "--image", folder)
    assert status == 2 and expected in said and len(said.strip().splitlines()) == 1, said
    assert not (folder / "img_txt.csv").exists()


def test_wrong_places(coco, tmp_path, outcome, monkeypatch):
    """All are found before the captions are read."""
    monkeypatch.setattr(json, "loads", lambda *_: pytest.fail("read"))
    label, folder = coco
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.rglob("*"))
    for flags, expected in (
            ({"--label": tmp_path / "none.json"}, "none.json: no such file"), ({"--label": ""}, "--label is empty"),
            ({"--label": folder}, "is a folder; expected COCO's captions"),
            ({"--label": tmp_path / "pipe"}, "pipe: is not a regular file"),
            ({"--image": tmp_path / "none"}, "none: no such folder"), ({"--image": label}, "json: is not a folder"),
            ({"--out": label}, "json: does not end in .csv"), ({"--out": folder}, "is a folder; name another file"),
            ({"--out": label / "a.csv"}, "a.csv: cannot be written"), ({"--out": ""}, "--out is empty")):
        words = {"--label": label, "--image": folder, **flags}
        status, said = outcome(main, *[word for pair in words.items() for word in pair])
        assert status == 2 and expected in said and len(said.strip().splitlines()) == 1, said
    assert sorted(tmp_path.rglob("*")) == before
