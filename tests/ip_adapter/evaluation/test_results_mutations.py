"""Damaged files of an evaluation: rows that are right, or one line; never a traceback, never a score that is lost."""
from __future__ import annotations

import argparse
import json
import random
import re

import pytest
from PIL import Image

from ip_adapter.evaluation import clip_evaluation as evaluation
from ip_adapter.evaluation.clip_evaluation import COLUMNS, SETTINGS, Evaluation, read_results, read_settings
from ip_adapter.evaluation.results import own_folder
from ldm.errors import UserError
from tests.support.mutations import mutations

ROWS = [{"row": 0, "dir": "a.png", "clip_i": 0.828125, "clip_t": 0.5}, {"row": 1, "dir": "b,c é.png", "clip_i": 0.75,
        "clip_t": None}, {"row": 7, "dir": 'd "e".png', "clip_i": -0.015625, "clip_t": 1.25}]


@pytest.fixture
def folder(tmp_path):
    """An evaluation of three rows, as one writes it."""
    one = Evaluation.__new__(Evaluation)
    one.args, one.folder, one.settings = argparse.Namespace(variations=0), tmp_path, dict.fromkeys(SETTINGS, 1)
    one._keep([], ROWS)
    return tmp_path


def read(path) -> list | None:
    """Rows, or None where one line says why not."""
    try:
        return read_results(path)
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error) and "none of its rows can be read" in str(error)
        return None


def test_what_is_written_is_read(folder, caplog):
    assert read_results(folder / "results.csv") == ROWS and not caplog.records
    assert (folder / "results.csv").read_text().splitlines()[0] == ",".join(COLUMNS)


def spreadsheet(text: str, delimiter: str, comma: bool) -> str:
    """As programs for tables save it."""
    lines = ["0|a.png|0.828125|0.5", "1|b,c é.png|0.75|", '7|"d ""e"".png"|-0.015625|1.25']
    checks = re.findall(r"x[0-9a-f]{8}", text)
    rows = [f"{line.replace('.', ',') if comma else line}|{check}" for line, check in zip(lines, checks)]
    rows = [row.replace(",png", ".png") for row in rows]
    if delimiter == ",":
        rows[1] = rows[1].replace("b,c é.png", '"b,c é.png"')
    return "\r\n".join(["|".join(COLUMNS), *rows, ""]).replace("|", delimiter)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter, comma", [(",", False), (";", True), (";", False), ("\t", True)])
def test_a_spreadsheet_may_have_saved_it(folder, caplog, encoding, delimiter, comma):
    path = folder / "results.csv"
    path.write_bytes(spreadsheet(path.read_text(), delimiter, comma).encode(encoding))
    assert read_results(path) == ROWS and not caplog.records


def test_files_of_before_there_were_checksums_are_taken(folder):
    path = folder / "results.csv"
    path.write_text(re.sub(r",(x[0-9a-f]{8}|check)$", "", path.read_text(), flags=re.M))
    assert "check" not in path.read_text() and read_results(path) == ROWS


def test_damaged_results(folder):
    """Every row that is read is one that was written, and those that a mutation did not touch are read."""
    path, lost, refused = folder / "results.csv", 0, 0
    content = path.read_bytes()
    for n, bad in enumerate(mutations(content, 3, 3000)):
        path.write_bytes(bad)
        rows = read(path)
        refused += rows is None
        if rows is None:
            continue
        assert all(row in ROWS for row in rows), (n, bad)
        kept = [row for row, line in zip(ROWS, content.splitlines(keepends=True)[1:])
                if b"\n" + line in bad and bad.startswith(content.splitlines()[0])]
        assert all(row in rows for row in kept), (n, bad)
        lost += len(rows) < 3
    assert lost > 1000 and refused > 30


def test_a_tail_or_a_whole_file_of_zeros(folder, caplog):
    path = folder / "results.csv"
    path.write_bytes(path.read_bytes() + bytes(5000))
    assert read_results(path) == ROWS and not caplog.records
    path.write_bytes(bytes(5000))
    assert read_results(path) == []


def test_what_cannot_be_read_is_not_overwritten(folder, monkeypatch):
    """Nothing is made, and the file stays as it is."""
    path, made = folder / "results.csv", []
    path.write_bytes(path.read_bytes().replace(b",", b"|"))
    before = path.read_bytes()
    one = Evaluation.__new__(Evaluation)
    one.args, one.folder = argparse.Namespace(variations=0), folder
    monkeypatch.setattr(Evaluation, "_make", lambda *_: made.append(1))
    with pytest.raises(UserError, match="none of its rows can be read.*mend it, remove it to make all images again"):
        with own_folder(folder, "--out"):
            one.run(None, None)
    assert path.read_bytes() == before and not made


def test_damaged_settings(folder):
    """One line, or settings of which those that differ are named."""
    note, refused = folder / "settings.json", 0
    content = note.read_bytes()
    spoilt = [content.decode().encode("utf-16"), content + bytes(50), b"\xef\xbb\xbf" + content, b"", bytes(9),
              content.replace(b",", b";"), *mutations(content, 4, 2000)]
    rng = random.Random(0)
    spoilt += [content.replace(b"1", rng.choice([b"1e999", b"9" * 5000, b'"\\ud800"', b"NaN", b"[[1]]"]), 1)] * 5
    for bad in spoilt:
        note.write_bytes(bad)
        try:
            assert isinstance(read_settings(note), dict)
        except UserError as error:
            assert "\n" not in str(error) and "settings.json: is damaged" in str(error)
            refused += 1
    assert refused > 500
    note.write_bytes(b"\xef\xbb\xbf" + content)
    assert read_settings(note) == json.loads(content)


def test_settings_that_differ_are_shown_on_one_line(folder, monkeypatch):
    monkeypatch.setattr(evaluation, "file_sha256", lambda path: "0" * 64)
    args = argparse.Namespace(out=folder, ip_adapter=None, clip=None, **dict.fromkeys(SETTINGS, 1))
    Image.new("RGB", (8, 8)).save(folder / "w.ckpt", "PNG")
    for value in ('"\\ud800\\n\\u001b[31m"', "[" * 50 + "]" * 50, "1e999", "9" * 4000):
        (folder / "settings.json").write_text(f'{{"seed": {value}}}')
        with pytest.raises(UserError, match="holds an evaluation with ") as error:
            Evaluation(args, folder / "w.ckpt", None)
        assert "\n" not in str(error.value) and "\x1b" not in str(error.value) and len(str(error.value)) < 1000
