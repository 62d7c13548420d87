"""Folders made for files: what fails or is stopped leaves none of them."""
from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from pathlib import Path

import pytest

from ldm.files import made_folder, replacing, temporary_folder, write_new


def full(*_, **__):
    raise OSError(28, "No space left on device")


def test_a_temporary_folder_that_cannot_be_made_leaves_no_parents(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(OSError, match="No space"), temporary_folder(tmp_path / "a" / "b"):
        pass
    assert not list(tmp_path.iterdir())


def test_parents_of_a_temporary_folder_stay_if_they_are_used_meanwhile(tmp_path, monkeypatch):
    def another_writes(dir, prefix):
        (Path(dir) / "file").write_text("of another process")
        full()

    monkeypatch.setattr(tempfile, "mkdtemp", another_writes)
    with pytest.raises(OSError), temporary_folder(tmp_path / "a" / "b"):
        pass
    assert (tmp_path / "a" / "b" / "file").read_text() == "of another process"


@pytest.mark.parametrize("use", [temporary_folder, made_folder, lambda path: replacing(path / "file"),
                                 lambda path: write_new(path / "file", b"")])
def test_folders_that_can_be_made_in_part_only_go_again(tmp_path, monkeypatch, use):
    make, made = os.mkdir, []

    def two_only(path, *args, **more):
        if len(made) == 2:
            full()
        made.append(path)
        make(path, *args, **more)

    monkeypatch.setattr(os, "mkdir", two_only)
    with pytest.raises(OSError, match="No space"):
        with use(tmp_path / "a" / "b" / "c"):
            pass
    assert len(made) == 2 and not list(tmp_path.iterdir())


def test_a_temporary_folder_and_its_parents_go_at_the_end(tmp_path):
    with temporary_folder(tmp_path / "a" / "b") as folder:
        (folder / "file").write_text("")
        assert folder.parent == tmp_path / "a" / "b"
    assert not list(tmp_path.iterdir())


def test_a_temporary_folder_goes_while_another_thread_writes_into_it(tmp_path):
    def write(folder: Path) -> None:
        with contextlib.suppress(OSError):
            for n in range(100000):
                (folder / str(n)).touch()

    for _ in range(20):
        with temporary_folder(tmp_path) as folder:
            writer = threading.Thread(target=write, args=[folder])
            writer.start()
            while not any(folder.iterdir()):
                pass
        writer.join(5)
        assert list(tmp_path.iterdir()) == []
