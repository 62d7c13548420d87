"""Pictures that are written: names, metadata, grids, fingerprints."""
from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ip_adapter.images.preprocess import open_image
from ip_adapter.images.saving import file_sha256, grid, remember_sha256, save_png
from ldm.errors import UserError
from ldm.files import cache_folder, printable, valid_unicode, write_new
from tests.support.arrays import DATA
from tests.support.scripts import ROOT

SMALL = Image.new("RGB", (2, 2))


@pytest.fixture(params=["links", "no links"])
def file_system(request, monkeypatch):
    """A file system with hard links, and one without, as FAT, SMB and some FUSE ones."""
    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")
    if request.param == "no links":
        monkeypatch.setattr(os, "link", refuse)


def test_nothing_is_overwritten_by_several_writers(tmp_path, file_system):
    (tmp_path / "00004.png").write_bytes(b"mine")
    with ThreadPoolExecutor(8) as pool:
        pictures = [Image.new("RGB", (2, 2), (i, 0, 0)) for i in range(40)]
        paths = list(pool.map(lambda picture: save_png(tmp_path, picture, {}), pictures))
    assert len(set(paths)) == 40 and (tmp_path / "00004.png").read_bytes() == b"mine"
    assert sorted(Image.open(path).getpixel((0, 0))[0] for path in paths) == list(range(40))
    assert len(os.listdir(tmp_path)) == 41


def test_nothing_is_overwritten_by_several_processes(tmp_path):
    program = ("import os, sys; sys.path.insert(0, sys.argv[1])\n"
               "from pathlib import Path; from PIL import Image; from ip_adapter.images.saving import save_png\n"
               "if sys.argv[3] == 'no links': os.link = lambda *_: os.stat('/none')  # an OSError\n"
               "for _ in range(30): save_png(Path(sys.argv[2]), Image.new('RGB', (2, 2)), {})")
    processes = [subprocess.Popen([sys.executable, "-c", program, ROOT, tmp_path / "new", kind])
                 for kind in ("links", "no links", "no links")]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert sorted(os.listdir(tmp_path / "new")) == [f"{n:05d}.png" for n in range(90)]
    assert all(Image.open(path).size == (2, 2) for path in (tmp_path / "new").iterdir())


def test_files_have_the_users_permissions(tmp_path, file_system):
    before = os.umask(0o027)
    try:
        assert stat.S_IMODE(save_png(tmp_path, SMALL, {}).stat().st_mode) == 0o640
    finally:
        os.umask(before)


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="--output_path .*new.*No space left on device.*; free some space"):
        save_png(tmp_path / "new" / "samples", SMALL, {})
    monkeypatch.undo()
    monkeypatch.setattr(os, "link", fail)
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match="No space left"):
        save_png(tmp_path / "new" / "samples", SMALL, {})
    assert not list(tmp_path.iterdir())


def test_a_signal_leaves_nothing(tmp_path):
    program = ("import os, sys; sys.path.insert(0, sys.argv[1])\n"
               "from pathlib import Path; from PIL import Image; from ip_adapter.images.saving import save_png\n"
               "from ldm.files import remove_unfinished\n"
               "os.fsync = lambda *_: (remove_unfinished(), os._exit(143))\n"
               "save_png(Path(sys.argv[2]), Image.new('RGB', (2, 2)), {})")
    result = subprocess.run([sys.executable, "-c", program, ROOT, tmp_path / "new" / "samples"], timeout=60)
    assert result.returncode == 143 and not list(tmp_path.iterdir())


def test_every_kind_of_file_takes_its_name(tmp_path, file_system):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "link", "pipe"):
        assert not write_new(tmp_path / name, b"x")
    assert write_new(tmp_path / "new", b"x") and (tmp_path / "new").read_bytes() == b"x"
    assert sorted(os.listdir(tmp_path)) == ["folder", "link", "new", "pipe"]


@pytest.mark.parametrize("text, stored", [
    ("caf\udce9.png", "caf\ufffd.png"), ("half \ud83d", "half \ufffd"), ("\ud83d\ude00", "\U0001f600"),
    ("a\0b\n", "a\0b\n"), (None, "None"), (Path("/caf\udce9"), "/caf\ufffd"), (b"\xff", "b'\\xff'"),
    (1.5, "1.5"), ("", "")])
def test_any_text_is_stored(tmp_path, text, stored):
    path = save_png(tmp_path / "caf\udce9", SMALL, {"prompt": text})
    assert Image.open(path).text == {"prompt": stored} and open_image(path).size == (2, 2)


def test_shown_texts_have_one_line_and_no_terminal_codes():
    assert printable("a\nb\x1b[31m\u2028 図") == "a?b?[31m? 図"
    assert printable("caf\udce9 \ud83d \ud83d\ude00") == "caf\ufffd \ufffd \U0001f600"
    assert valid_unicode("a\n\ufeff") == "a\n\ufeff"


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output_path .*cannot write"):
        save_png(tmp_path / "file", Image.new("RGB", (2, 2)), {})


def test_grid_has_the_inputs_on_the_left():
    pictures = np.full((2, 8, 16, 3), 9, np.uint8)
    result = np.asarray(grid([Image.new("RGB", (10, 10), "red")], pictures))
    assert result.shape == (8, 48, 3)
    assert result[4, [8, 0, 20]].tolist() == [[255, 0, 0], [255, 255, 255], [9, 9, 9]]


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 65000), (1, 1)])
def test_the_grid_shows_the_narrowest_pictures(size):
    result = np.asarray(grid([Image.new("RGB", size, "red")], np.zeros((1, 64, 48, 3), np.uint8)))
    red = (result[:, :48] == (255, 0, 0)).all(2)
    assert result.shape == (64, 96, 3) and red.any(0).sum() in (1, 48) and red.any(1).sum() in (1, 48, 64)
    assert red[32 if size[1] == 1 else 5].any() and (result[:, :48][~red] == 255).all()
    grid([open_image(DATA / "faults" / "thin5000.png")], np.zeros((1, 64, 48, 3), np.uint8))


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A file, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "model.ckpt").write_bytes(b"one")
    return tmp_path / "models" / "model.ckpt"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def notes() -> list:
    """What is in the cache."""
    return sorted((cache_folder() / "sha256").iterdir())


def test_the_fingerprint_is_remembered_in_the_cache(model, monkeypatch):
    assert file_sha256(model) == sha256(b"one") and len(notes()) == 1
    assert [path.name for path in model.parent.iterdir()] == ["model.ckpt"]
    remember_sha256(model, "0" * 64)
    assert file_sha256(model) == "0" * 64
    monkeypatch.chdir(model.parent)
    assert file_sha256(Path("model.ckpt")) == "0" * 64  # by its whole path


def test_the_fingerprint_of_another_file_is_not_taken(model):
    """Also where the other file is older, and of the same size."""
    other = model.with_name("other.ckpt")
    other.write_bytes(b"two")
    os.utime(other, (1e9, 1e9))
    assert file_sha256(model) == sha256(b"one")
    other.rename(model)
    assert file_sha256(model) == sha256(b"two")
    model.write_bytes(b"six")
    os.utime(model, (1e9 - 1, 1e9 - 1))
    assert file_sha256(model) == sha256(b"six")
    model.write_bytes(b"seven")
    assert file_sha256(model) == sha256(b"seven")


@pytest.mark.parametrize("note", [
    b"", b"{digest}", "{digest} 1 2 3\n".encode("utf-16"), b"\xff" * 70, b"../../etc/passwd 3 4 5\n"])
def test_a_damaged_note_is_ignored(model, note):
    file_sha256(model)
    state = notes()[0].read_bytes()[64:]
    for content in (note, b"G" * 64 + state, b"0" * 63 + state, b"0" * 64 + state + b"x"):
        notes()[0].write_bytes(content)
        assert file_sha256(model) == sha256(b"one")
    assert notes()[0].read_bytes() == sha256(b"one").encode() + state


def test_a_note_is_never_written_through_a_link(model, tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    file_sha256(model)
    note = notes()[0]
    note.unlink()
    note.symlink_to(mine)
    assert file_sha256(model) == sha256(b"one") and mine.read_text() == "mine" and not note.is_symlink()
    note.unlink()
    os.mkfifo(note)
    assert file_sha256(model) == sha256(b"one")  # to read a pipe would take for ever


def test_no_cache_costs_only_time(model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert file_sha256(model) == sha256(b"one")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # says nothing, by the specification of these folders
    assert file_sha256(model) == sha256(b"one") and cache_folder() is None

    def no_home():
        raise RuntimeError("Could not determine home directory.")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert file_sha256(model) == sha256(b"one") and cache_folder() is None
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert cache_folder() == tmp_path / ".cache" / "ip_adapter"
