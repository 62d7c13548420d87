"""Networks and checkpoint files: which tensors of a file make which parameter, and strict loading.

A `Layout` (`ldm/checkpoints/layout.py`) is the naming of one part of one kind of file. The same rules load, save,
merge and convert; the inverse is found by listing the parameters. Reading and writing the files themselves
is in `checkpoint_file.py`, the rules are in `ldm/checkpoints/names.py`, `gm/names.py` and `ip_adapter/names.py`.
"""
from __future__ import annotations

import mmap
import re
from typing import Callable, Iterable, NamedTuple

import numpy as np
from mindspore import Tensor, nn
from mindspore import dtype as mstype

from ldm.checkpoints.file import CheckpointError, CheckpointFile, TensorInfo, mapping
from ldm.checkpoints.formats.index import kept_dtype
from ldm.checkpoints.layout import Layout, Source
from ldm.modules.weight import stored_shape

SHOWN = 20  # names listed in a message, of each kind
MAX_COUNT = 64  # blocks or levels of a network; the deepest published one has 48


def assemble(source: Source, read: Callable[[str], np.ndarray]) -> np.ndarray:
    """Tensors on disk -> one parameter.

    Args:
        source: which tensors, and how they make it.
        read: name -> tensor.
    """
    if source.how == "stack":
        return np.concatenate([read(name) for name in source.names])
    value = read(source.names[0])
    if source.how == "transpose":
        return np.ascontiguousarray(value.T)
    return value.reshape(value.shape + (1, 1)) if source.how == "1x1" else value


class View:
    """The tensors of a file under the paths of a network, found through a layout."""

    def __init__(self, tensors: dict, layout: Layout):
        self.tensors, self.layout = tensors, layout

    def shape(self, path: str, dims: int | None = None) -> tuple | None:
        """Shape of the parameter at `path`, or None if the file does not have it.

        Args:
            path: in the network.
            dims: how many dimensions it has to have; a tensor of another number does not count, nor does an empty one.
        """
        shape = self.layout.source(path).shape(self.tensors)
        fits = shape is not None and min(shape, default=1) > 0 and dims in (None, len(shape))
        return shape if fits else None

    def __contains__(self, path: str) -> bool:
        return self.shape(path) is not None

    def count(self, pattern: str) -> int:
        """How many of `pattern.format(0)`, `pattern.format(1)`, ... exist without a gap.

        Raises:
            CheckpointError: more than any network has; to build it would take minutes.
        """
        n = 0
        while pattern.format(n) in self:
            n += 1
            if n > MAX_COUNT:
                name = self.layout.source(pattern.format(n - 1)).names[0]
                raise CheckpointError(f"the file holds {name}, expected at most {MAX_COUNT} blocks or levels; give a "
                                      "published or finetuned model")
        return n


class Part(NamedTuple):
    """Some parameters of a network, with the file and layout they come from."""

    shapes: dict  # path in the network -> shape
    file: CheckpointFile
    layout: Layout

    def sources(self) -> dict:
        """Path -> Source."""
        return {path: self.layout.source(path) for path in self.shapes}


def parameter_shapes(cell: nn.Cell, pattern: str = "") -> dict:
    """Path -> shape in files of the parameters of `cell` whose path matches `pattern` and that files hold.

    Run-time values (`ip_scale`) are parameters to MindSpore but belong to no file.
    """
    return {path: stored_shape(p) for path, p in cell.parameters_and_names()
            if not path.endswith("ip_scale") and re.search(pattern, path)}


def best_layout(tensors: dict, paths: Iterable[str], layouts: Iterable[Layout]) -> Layout:
    """The layout under which `tensors` has most of `paths`; the first one on a tie."""
    paths = list(paths)
    return max(layouts, key=lambda layout: sum(path in View(tensors, layout) for path in paths))


def check(parts: Iterable[Part], allowed: str = r"(?!)") -> None:
    """Check that the parts find all their tensors, floats of the right shapes, and that their files hold nothing else.

    Args:
        parts: all parts that are read from the files concerned.
        allowed: pattern of names a file may hold beyond that.

    Raises:
        CheckpointError: naming what is missing, misshapen, no weights or left over (20 of each, and totals).
    """
    by_file: dict = {}
    for part in parts:
        by_file.setdefault(part.file, []).append(part)
    for file, its_parts in by_file.items():
        report = [f"{len(names)} {what}: {', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"
                  for what, names in _faults(file, its_parts, allowed).items() if names]
        if report:
            raise CheckpointError(f"{file.path} does not fit the network: {'; '.join(report)}")


def _faults(file: CheckpointFile, parts: list, allowed: str) -> dict:
    """What `check` finds in one file: descriptions of tensors by the kind of fault."""
    missing, misshapen, other, used = [], [], [], set()
    for part in parts:
        for path, source in part.sources().items():
            used.update(source.names)
            present = [name for name in source.names if name in file.tensors]
            missing += [name for name in source.names if name not in present]
            other += [f"{name} is {file.tensors[name].dtype}, expected floating point" for name in present
                      if "float" not in file.tensors[name].dtype]
            found = source.shape(file.tensors)
            if found != part.shapes[path] and len(present) == len(source.names):
                shown = found or tuple(file.tensors[name].shape for name in present)
                misshapen.append(f"{source.names[0]} {shown}, expected {part.shapes[path]}")
    ignored = "|".join([allowed] + [part.layout.ignored for part in parts])
    extra = [name for name in file.tensors if name not in used and not re.search(ignored, name)]
    return {"missing": missing, "of another shape": misshapen, "quantised or no weights": other, "unexpected": extra}


def read_parameter(file: CheckpointFile, source: Source, dtype: str | None = None) -> np.ndarray:
    """One parameter, float, checked to be finite as it will be used.

    Args:
        file: holds it.
        source: which tensors make it.
        dtype: what it is cast to, such as "float16"; None leaves it as the file has it.

    Raises:
        CheckpointError: it holds NaN or infinity, or would after the cast.
    """
    stored = assemble(source, file.read)
    # Who reads the message is told of the cast, and not of each element that numpy warns about.
    with np.errstate(over="ignore", invalid="ignore"):
        value = np.asarray(stored, dtype)
        # A sum is one fast pass and cannot be finite if an element is not; a finite but huge tensor may overflow it.
        if not np.isfinite(value.sum(dtype=np.float32)) and not np.isfinite(value).all():
            raise CheckpointError(f"{file.path}: {source.names[0]} {_not_finite(stored, value)}")
    return value


def _not_finite(stored: np.ndarray, value: np.ndarray) -> str:
    """What is wrong with a tensor that is not finite once it is cast, and the way out."""
    if not np.isfinite(stored).all():
        return "holds NaN or infinite values; the file is damaged"
    largest, fits = np.abs(stored).max(), np.abs(stored).max() <= np.finfo(np.float32).max
    way_out = "use --dtype float32" if fits else "the file is damaged, or no weights"
    return f"holds values up to {largest:.3g}, beyond the range of {value.dtype}; {way_out}"


_NUMPY = {mstype.float32: "float32", mstype.float16: "float16"}


def load(cell: nn.Cell, part: Part) -> None:
    """Read a part into the parameters of `cell`, one tensor at a time, each in the parameter's own dtype.

    Call `check` first; this only reads. What large tensors are mapped by is left in `cell.mappings`.
    """
    parameters, mappings = dict(cell.parameters_and_names()), []
    for path, source in part.sources().items():
        parameter = parameters[path]
        value = read_parameter(part.file, source, _NUMPY[parameter.dtype])
        value = np.ascontiguousarray(value).reshape(parameter.shape)
        parameter.set_data(Tensor.from_numpy(value))  # shares the memory, no second copy
        mappings.append(mapping(value))
    cell.mappings = [*getattr(cell, "mappings", ()), *(pages for pages in mappings if pages is not None)]


def leave_memory(*cells: nn.Cell) -> None:
    """Give back the memory of what `load` mapped, of networks that are done with and whose values nobody changed.

    MindSpore keeps the Parameters of a graph, also when cell and graph are gone. Who reads them after this reads the
    file. Where the system has no such call, nothing happens.
    """
    if hasattr(mmap, "MADV_DONTNEED"):
        for pages in (pages for cell in cells for pages in getattr(cell, "mappings", ())):
            pages.madvise(mmap.MADV_DONTNEED)


def plan(part: Part, target: Layout, dtype: str | None = None) -> dict:
    """How a part is written under another layout.

    Args:
        part: where the tensors come from.
        target: layout of the file to be written.
        dtype: "float32" or "float16"; None keeps what the source has, but for 8-bit floats, which become float16.

    Returns:
        Name in the new file -> (TensorInfo, function that reads and converts the tensor).
    """
    out = {}
    for path, source in part.sources().items():
        kind = dtype or kept_dtype(part.file.tensors[source.names[0]].dtype)
        cast = None if kind == "bfloat16" else kind  # which numpy does not have: the writer narrows it
        for name, (shape, take) in target.source(path).disassemble(part.shapes[path]).items():
            out[name] = (TensorInfo(tuple(shape), kind),
                         lambda source=source, take=take, cast=cast: take(read_parameter(part.file, source, cast)))
    return out
