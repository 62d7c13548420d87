"""Files that programs read and write: tried before long work, written whole or not at all, removed at a stop.

Every file that is read again is written by `replacing`; every path a user names goes through one of the `check_`
functions before anything large is loaded.
"""
from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import stat
import tempfile
import threading
from pathlib import Path
from typing import Iterator

from ldm.errors import UserError

# What is written under a temporary name, and folders made for it; innermost first within each list.
_unfinished: list = []
_registry = threading.Lock()


def printable(text) -> str:
    """A path or text as it can be shown on one line: control characters and the like become `?`."""
    return "".join(letter if letter.isprintable() else "?" for letter in valid_unicode(text))


def valid_unicode(text) -> str:
    """A path or text that every encoding of Unicode can store.

    Bytes of a file name that are not UTF-8 and halves of surrogate pairs become U+FFFD, whole pairs one character.
    """
    return str(text).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def reason(error: OSError) -> str:
    """Why an operation on a file failed, in the system's words."""
    return error.strerror or str(error)


def cache_folder() -> Path | None:
    """This project's part of the user's cache, which may not exist yet; None where the user has no home."""
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # neither HOME nor an entry in the password file
        return None
    return caches / "ip_adapter" if caches.is_absolute() else None


def check_readable(path, name: str, expected: str = "a file") -> Path:
    """Open a file for a moment.

    Args:
        path: file.
        name: of the argument or flag, for messages.
        expected: what the file should be, for messages.

    Raises:
        UserError: it is missing, no regular file, or cannot be opened.
    """
    shown = f"{name} {printable(path)}" if str(path) else f"{name} is empty"
    try:
        mode = os.stat(path).st_mode if str(path) else 0
        if stat.S_ISDIR(mode):
            raise UserError(f"{shown}: is a folder; expected {expected}")
        if not stat.S_ISREG(mode):  # to open a pipe would wait for its other end
            raise UserError(f"{shown}: is not a regular file; expected {expected}" if mode else
                            f"{shown}; expected the path of {expected}")
        with open(path, "rb"):
            return Path(path)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{shown}: no such file; expected {expected}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL character
        raise UserError(f"{shown}: cannot be opened ({_why(error)}); check the path and its permissions") from None


def check_folder(path, name: str) -> Path:
    """List a folder for a moment.

    Raises:
        UserError: it is missing, no folder, or cannot be listed.
    """
    shown = f"{name} {printable(path)}" if str(path) else f"{name} is empty"
    try:
        with os.scandir(path):
            return Path(path)
    except FileNotFoundError:
        raise UserError(f"{shown}: no such folder; check the path") from None
    except NotADirectoryError:
        raise UserError(f"{shown}: is not a folder; name a folder") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{shown}: cannot be read ({_why(error)}); check the path and its permissions") from None


def check_writable(path, name: str, folder: bool = False) -> Path:
    """Create and remove a file where `path`, a file or a folder that need not exist yet, would be written.

    Args:
        path: file to write, or with `folder` a folder to write into.
        name: of the argument or flag, for messages.
        folder: what `path` is.

    Raises:
        UserError: it cannot be written there. Nothing is left behind.
    """
    shown = f"{name} {printable(path)}" if str(path) else f"{name} is empty"
    advice = f"name another {'folder' if folder else 'file'}"
    try:
        if not str(path):
            raise UserError(f"{shown}; {advice}")
        path = Path(path)
        with contextlib.suppress(FileNotFoundError):
            mode = os.stat(path).st_mode
            if folder and not stat.S_ISDIR(mode):
                raise UserError(f"{shown}: is not a folder; {advice}")
            if not folder and not stat.S_ISREG(mode):
                raise UserError(f"{shown}: is {'a folder' if stat.S_ISDIR(mode) else 'not a regular file'}; {advice}")
        above = path if folder else path.parent
        while not os.path.lexists(above):
            above = above.parent
        with tempfile.TemporaryFile(dir=above):
            return path
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{shown}: cannot be written ({_why(error)}); {advice}") from None


def check_apart(path, name: str, sources: dict) -> None:
    """Refuse to write a file in the place of one that is read, under whatever name.

    Args:
        path: file to write.
        name: of the argument or flag, for messages.
        sources: argument or flag -> file that is read, or None.

    Raises:
        UserError: it is one of the sources.
    """
    for flag, source in sources.items():
        if source is not None and os.path.exists(path) and os.path.exists(source) and os.path.samefile(path, source):
            raise UserError(f"{name} {printable(path)}: is the file of {flag}, which is read; name another file")


def _why(error: Exception) -> str:
    return reason(error) if isinstance(error, OSError) else str(error)


@contextlib.contextmanager
def replacing(path, needed: int = 0, text: bool = False) -> Iterator:
    """A new file, open for writing, that takes the place of `path` if the block ends without an exception.

    Until then an older file stays as it is. After a failure or a signal it still does, and neither the unfinished file
    nor a folder made for it is left.

    Args:
        path: to write; its folder is made if missing.
        needed: bytes that will be written, if known: refused at once where they are not free.
        text: open for UTF-8 text instead of bytes; line ends are written as they are given.

    Raises:
        OSError: it cannot be written; ENOSPC also before anything is, see `needed`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:200]}.{os.getpid()}.tmp")
    made = [temporary]
    try:
        with _registry:
            _unfinished.append(made)
            made += _make_folder(path.parent)
        free = shutil.disk_usage(path.parent).free
        if free < needed:
            raise OSError(28, f"{needed} bytes are needed, {free} are free ({needed - free} short)", str(path))
        with open(temporary, "w" if text else "wb", **({"encoding": "utf-8", "newline": ""} if text else {})) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with _registry:  # who stops the program waits for this, or keeps it from happening
            os.replace(temporary, path)
            made.clear()
    finally:
        _remove(made)
        with _registry:
            _unfinished.remove(made)


def write_text(path, text: str) -> None:
    """Write a small text file as `replacing` does."""
    with replacing(path, text=True) as file:
        file.write(text)


def write_new(path, data: bytes) -> bool:
    """Write a whole file unless its name is taken: by any kind of file, also one of another process.

    Args:
        path: to write; its folder is made if missing.
        data: the whole content.

    Returns:
        Whether it was written. After a failure or a signal nothing is left.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")  # several threads may be writing into the folder
    made = [temporary]
    try:
        with _registry:
            _unfinished.append(made)
            made += _make_folder(path.parent)
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with _registry:
            return _name_new(temporary, path)
    finally:
        _remove(made)
        with _registry:
            _unfinished.remove(made)


def _name_new(temporary: Path, path: Path) -> bool:
    """Give a finished file its name; False if the name is taken."""
    try:
        os.link(temporary, path)  # unlike a rename, it never takes the place of another file
        return True
    except FileExistsError:
        return False
    except OSError:  # FAT, SMB and some FUSE file systems have no links, each says so in its own way
        pass
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    try:
        os.replace(temporary, path)
        return True
    except OSError:
        path.unlink()
        raise


@contextlib.contextmanager
def temporary_folder(parent, prefix: str = ".unfinished.") -> Iterator[Path]:
    """A folder that is gone when the block ends or the program is stopped by a signal.

    Args:
        parent: where it is made; made if missing, and removed again if it is empty at the end.
        prefix: of its name.
    """
    made = [Path(parent) / f".{os.getpid()}.none"]  # the place of the folder, until there is one
    try:
        with _registry:
            _unfinished.append(made)
            made += _make_folder(Path(parent))
            made[0] = Path(tempfile.mkdtemp(dir=parent, prefix=prefix))
        yield made[0]
    finally:
        _remove(made)
        with _registry:
            _unfinished.remove(made)


@contextlib.contextmanager
def made_folder(folder) -> Iterator[Path]:
    """A folder, made if missing; what was made and is still empty at the end, or at a signal, is removed again."""
    folder = Path(folder)
    made = [folder / f".{os.getpid()}.none"]  # the place of a temporary file, which there is none of
    try:
        with _registry:
            _unfinished.append(made)
            made += _make_folder(folder)
        yield folder
    finally:
        _remove(made)
        with _registry:
            _unfinished.remove(made)


def _make_folder(folder: Path) -> list:
    """Make a folder and those above it; returns what was made, innermost first. If one cannot be made, none is left."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    try:
        for one in reversed(missing):
            one.mkdir(exist_ok=True)
    except OSError:
        for one in missing:
            with contextlib.suppress(OSError):
                one.rmdir()
        raise
    return missing


def _remove(made: list) -> None:
    """Remove a temporary file or folder, and the folders made for it that nobody has used meanwhile."""
    for path in made:
        with contextlib.suppress(OSError):
            path.rmdir() if path is not made[0] else _remove_folder(path) if path.is_dir() else path.unlink()


def _remove_folder(path: Path) -> None:
    """Remove a folder into which another thread may be writing: under its new name no further file reaches it."""
    moved = path.with_name(f"{path.name}.removed")
    path.rename(moved)
    for _ in range(10):  # a file that was just being opened still gets in
        shutil.rmtree(moved, ignore_errors=True)
        if not moved.exists():
            return


def remove_unfinished() -> None:
    """Remove what is being written; afterwards nothing can be begun or completed. For a process that ends."""
    _registry.acquire(timeout=2)
    for made in list(_unfinished):
        _remove(made)


@contextlib.contextmanager
def locked(folder, name: str) -> Iterator[None]:
    """Keep other processes out of a folder while they ask for the same lock; it dies with its process.

    File systems that know no locks (some network ones) are used without.

    Args:
        folder: existing folder.
        name: of the argument or flag, for messages.

    Raises:
        UserError: another process holds it.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{name} {printable(folder)}: another process is writing into this folder; wait for it, or "
                            "name another folder") from None
        except OSError:
            pass
        yield
    finally:
        os.close(handle)
