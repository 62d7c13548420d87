"""Features of a whole data set on disk: computed once, read in place of images, kept for later runs."""
from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import weakref
import zlib
from pathlib import Path
from typing import BinaryIO, Iterable, NamedTuple

import numpy as np
from tqdm import tqdm

from ip_adapter.data.dataset import ImageTextDataset
from ip_adapter.data.features import Features, FrozenEncoders
from ip_adapter.data.stream import stack
from ldm.errors import UserError
from ldm.files import check_readable, printable, reason

VERSION = "v2"  # of the format; a cache of another version has another name and is never read

log = logging.getLogger(__name__)


class FeatureBatch(NamedTuple):
    """The samples of one step."""

    step: int
    positions: np.ndarray  # (B,) int64, places in the stream
    features: Features


class FeatureCache:
    """Records of features in one file, each with its key and a checksum.

    A key is the sha256 of an image, its prompt and its caption; the file's name is that of everything else features
    depend on. The checksum covers name, key and features: a record counts if it is the one that was written, in this
    file and for this key. What a killed run or a bad disk leaves is computed anew in its place, and of a data set that
    has grown or changed only what is new is computed.

    Args:
        folder: made if missing.
        encoders: make the features.
        size: (height, width) of the images in pixels.
    """

    def __init__(self, folder: Path, encoders: FrozenEncoders, size: tuple):
        shapes = encoders.shapes(size)
        self.record = np.dtype([("sum", "<u4"), ("key", "V32")] + [
            (name, "<i4" if name == "sizes" else "<f2", shape) for name, shape in zip(Features._fields, shapes)])
        name = hashlib.sha256(f"{encoders.fingerprint} {size} {shapes}".encode()).hexdigest()[:16]
        self.path = Path(folder) / f"features-{name}.{VERSION}.f16"
        self.encoders, self.places = encoders, np.zeros(0, np.int64)
        self.keys: dict = {}  # of the record that each row takes

    def fill(self, dataset: ImageTextDataset, batch: int, rows: Iterable[int] | None = None) -> None:
        """Compute what is missing or damaged, `batch` samples at a time; of some rows, whose size this is, or of all.

        Raises:
            UserError: the folder cannot be written to, or too many images cannot be read.
        """
        rows = range(len(dataset)) if rows is None else [int(row) for row in rows]
        keys = {row: sample_key(dataset, row) for row in rows}
        used = {row: row for row in rows}  # the row in place of one that cannot be read
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            older = sorted(self.path.parent.glob(f"{self.path.name.split('.')[0]}.*"))
            if older and not self.path.exists():
                log.warning("%s is of another version of this program; the features are computed anew, and it can be "
                            "deleted", " and ".join(map(printable, older)))
            with open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
                known: dict = {}  # key -> place
                self._verify(file, known)  # without the lock: all processes of a training read at the same time
                fcntl.flock(file, fcntl.LOCK_EX)  # two runs may share a folder; the lock dies with its process
                damaged = self._verify(file, known)  # what the other processes have written meanwhile
                if damaged:
                    log.warning("--cache_dir %s: %d of %d records in %s are damaged; they are computed anew",
                                printable(self.path.parent), len(damaged), len(known) + len(damaged), self.path.name)
                new = [row for row in rows if keys[row] not in known]
                for first in tqdm(range(0, len(new), batch), desc="encoding", unit="batch", disable=None):
                    fresh = {}
                    for row in new[first : first + batch]:
                        sample = dataset.sample(row, None)
                        used[row] = sample.index
                        if sample.index not in keys:
                            keys[sample.index] = sample_key(dataset, sample.index)
                        if keys[sample.index] not in known:
                            fresh[keys[sample.index]] = sample
                    for key, record in zip(fresh, self._encode(fresh) if fresh else ()):
                        place = damaged.pop() if damaged else len(known)
                        file.seek(place * self.record.itemsize)
                        file.write(record.tobytes())
                        file.flush()
                        known[key] = place
                self._handle = os.open(self.path, os.O_RDONLY)  # the file may be deleted while it is in use
                weakref.finalize(self, os.close, self._handle)
        except OSError as error:
            raise UserError(f"--cache_dir {printable(self.path.parent)}: {self.path.name} cannot be written "
                            f"({reason(error)}); free some space or choose another folder") from None
        self.keys = {row: keys[used[row]] for row in rows}
        self.places = np.full(len(dataset), -1)
        self.places[rows] = [known[self.keys[row]] for row in rows]

    def _verify(self, file: BinaryIO, known: dict) -> list:
        """Add the places of whole records to `known`, by key; returns those of damaged and doubled ones."""
        checked, damaged = set(known.values()), []
        places = range(os.fstat(file.fileno()).st_size // self.record.itemsize)
        for place in tqdm(places, desc="checking features", unit="image", disable=None, leave=False):
            if place not in checked:
                record = self._read(file.fileno(), place)
                key = record["key"].tobytes().hex()
                if record["sum"] != self._sum(record) or key in known:
                    damaged.append(place)
                else:
                    known[key] = place
        return damaged

    def _read(self, handle: int, place: int) -> np.void:
        """A record; what is missing at the end of the file is zero."""
        data = os.pread(handle, self.record.itemsize, place * self.record.itemsize)
        return np.frombuffer(data.ljust(self.record.itemsize, b"\0"), self.record)[0]

    def _sum(self, record: np.void) -> int:
        """CRC-32 of a record without its sum, continued from that of the file's name."""
        return zlib.crc32(record.tobytes()[4:], zlib.crc32(self.path.name.encode()))

    def _encode(self, samples: dict) -> np.ndarray:
        """Key -> sample as records."""
        features = self.encoders.features(stack(0, np.arange(len(samples)), list(samples.values())))
        records = np.zeros(len(samples), self.record)
        for name, values in features._asdict().items():
            records[name] = values
        for n, key in enumerate(samples):
            records["key"][n] = np.void(bytes.fromhex(key))
            records["sum"][n] = self._sum(records[n])
        return records

    def sample(self, row: int, position: int) -> np.void:
        """The record of a row, as `Loader` asks for it.

        Raises:
            UserError: it has been changed since `fill`.
        """
        record = self._read(self._handle, self.places[row])
        if record["sum"] != self._sum(record) or record["key"].tobytes().hex() != self.keys[row]:
            raise UserError(f"--cache_dir {printable(self.path.parent)}: {self.path.name} was changed while it was in "
                            "use; go on with --resume True, which computes the features anew")
        return record

    def collate(self, step: int, positions: np.ndarray, samples: list) -> FeatureBatch:
        """Put records together."""
        return FeatureBatch(step, positions, Features(*(np.stack([sample[name] for sample in samples])
                                                        for name in Features._fields)))


def sample_key(dataset: ImageTextDataset, row: int) -> str:
    """sha256 of a row's picture, picture prompt and caption; of one that cannot be opened, a key that no other has."""
    digests = b""
    for path in dict.fromkeys((dataset.path(row), dataset.prompt_path(row))):
        try:
            content = check_readable(path, dataset.flag).read_bytes()
        except (UserError, OSError):
            content = f"no file for row {row} of {dataset.csv}".encode()
        digests += hashlib.sha256(content).digest()
    return hashlib.sha256(digests + dataset.text(row).encode()).hexdigest()
