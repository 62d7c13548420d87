"""Features of a whole data set on disk: computed once, read in place of pictures, kept for later runs."""
from __future__ import annotations

import fcntl
import hashlib
from pathlib import Path
from typing import Iterable, NamedTuple

import numpy as np
from tqdm import tqdm

from ip_adapter.dataset import ImageTextDataset
from ip_adapter.features import Features, FrozenEncoders
from ip_adapter.stream import stack
from ldm.errors import UserError
from ldm.files import check_readable

KEY_LINE = 65  # bytes of a key and its line end


class FeatureBatch(NamedTuple):
    """The samples of one step."""

    step: int
    positions: np.ndarray  # (B,) int64, places in the stream
    features: Features


class FeatureCache:
    """Records of features in one file; beside it their keys, one a line, in the same order.

    A key is the sha256 of a picture, its prompt and its caption; the file's name is that of everything else features
    depend on. A record counts once its key is written, so a run that is killed loses the batch under way only, and of a
    data set that has grown or changed only what is new is computed.

    Args:
        folder: made if missing.
        encoders: make the features.
        size: (height, width) of the pictures in pixels.
    """

    def __init__(self, folder: Path, encoders: FrozenEncoders, size: tuple):
        shapes = encoders.shapes(size)
        self.record = np.dtype([(name, "<i4" if name == "sizes" else "<f2", shape)
                                for name, shape in zip(Features._fields, shapes)])
        name = hashlib.sha256(f"{encoders.fingerprint} {size} {shapes}".encode()).hexdigest()[:16]
        self.data, self.index = Path(folder) / f"features-{name}.f16", Path(folder) / f"features-{name}.keys"
        self.encoders, self.places = encoders, np.zeros(0, np.int64)

    def fill(self, dataset: ImageTextDataset, batch: int, rows: Iterable[int] | None = None) -> None:
        """Compute what is missing, `batch` samples at a time; of some rows, whose size this is, or of all.

        Raises:
            UserError: the folder cannot be written to, or too many pictures cannot be read.
        """
        rows = range(len(dataset)) if rows is None else [int(row) for row in rows]
        keys = {row: sample_key(dataset, row) for row in rows}
        used = {row: row for row in rows}  # the row in place of one that cannot be read
        try:
            self.data.parent.mkdir(parents=True, exist_ok=True)
            with open(self.data, "ab") as data, open(self.index, "a", encoding="ascii") as index:
                fcntl.flock(index, fcntl.LOCK_EX)  # two runs may share a folder; the lock dies with its process
                known = {key: n for n, key in enumerate(self._keys())}
                new = [row for row in rows if keys[row] not in known]
                data.truncate(len(known) * self.record.itemsize)
                index.truncate(len(known) * KEY_LINE)
                for first in tqdm(range(0, len(new), batch), desc="encoding", unit="batch", disable=None):
                    fresh = {}
                    for row in new[first : first + batch]:
                        sample = dataset.sample(row, None)
                        used[row] = sample.index
                        if sample.index not in keys:
                            keys[sample.index] = sample_key(dataset, sample.index)
                        if keys[sample.index] not in known:
                            fresh[keys[sample.index]] = sample
                    if fresh:
                        data.write(self._encode(list(fresh.values())))
                        data.flush()
                        index.write("".join(f"{key}\n" for key in fresh))
                        index.flush()
                        known.update(zip(fresh, range(len(known), len(known) + len(fresh))))
        except OSError as error:
            raise UserError(f"--cache_dir {self.data.parent}: cannot be written ({error.strerror or error}); free some "
                            "space or choose another folder") from None
        self.places = np.full(len(dataset), -1)
        self.places[rows] = [known[keys[used[row]]] for row in rows]
        self.records = np.memmap(self.data, self.record, "r")

    def _keys(self) -> list:
        """Keys whose records are on disk; what a killed run left beyond them is cut off by `fill`."""
        keys = self.index.read_text().split("\n")[:-1] if self.index.exists() else []
        size = self.data.stat().st_size if self.data.exists() else 0
        return keys[: size // self.record.itemsize]

    def _encode(self, samples: list) -> bytes:
        features = self.encoders.features(stack(0, np.arange(len(samples)), samples))
        records = np.empty(len(samples), self.record)
        for name, values in features._asdict().items():
            records[name] = values
        return records.tobytes()

    def sample(self, row: int, position: int) -> np.ndarray:
        """The record of a row, as `Loader` asks for it."""
        return np.array(self.records[self.places[row]])

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
