"""tools/prepare_coco.py: what it writes is what the data set reads, and mistakes are one line."""
from __future__ import annotations

import json

import pytest
from PIL import Image

from ip_adapter.dataset import ImageTextDataset
from tests.conftest import shell
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
    assert status == 0 and f"4 captions of 2 pictures written into {folder / 'img_txt.csv'}" in said
    assert "left out: 1 captions of 1 pictures that are not in" in said and "000000000030.jpg" in said
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


@pytest.mark.parametrize("content, expected", [
    ("{", "not what was expected"), ("[]", "not what was expected"), ("{}", "no 'images'"),
    ('{"images": [], "annotations": []}', "holds no captions"),
    ('{"images": [], "annotations": [{"image_id": 3, "caption": ""}]}', "no 3"),
    ('{"images": [{"id": 1, "file_name": "b.jpg"}], "annotations": [{"image_id": 1, "caption": "b"}]}',
     "holds none of the 1 pictures")])
def test_mistakes(coco, tmp_path, outcome, content, expected):
    _, folder = coco
    label = tmp_path / "label.json"
    label.write_text(content)
    status, said = outcome(main, "--label", label, "--image", folder)
    assert status == 2 and expected in said and len(said.strip().splitlines()) == 1, said
    assert not (folder / "img_txt.csv").exists()


def test_wrong_places(coco, tmp_path, outcome):
    label, folder = coco
    for flags, expected in ((["--label", tmp_path / "none.json", "--image", folder], "none.json: no such file"),
                            (["--label", label, "--image", tmp_path / "none"], "none: is no folder"),
                            (["--label", label, "--image", folder, "--out", tmp_path / "no" / "a.csv"],
                             "cannot be written")):
        status, said = outcome(main, *flags)
        assert status == 2 and expected in said, said
