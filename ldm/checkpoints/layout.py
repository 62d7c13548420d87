"""How the tensors of one part of a network are named in one kind of file, held as a few rules.

The rules themselves are in `ldm/checkpoints/names.py`, `gm/names.py` and `ip_adapter/names.py`;
`ldm/checkpoints/loading.py` reads and writes by them. Nothing large is imported here: command lines need the names of
families before anything is loaded.
"""
from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple


class Source(NamedTuple):
    """The tensors of a file that make one parameter.

    `how` is "copy", "stack" (concatenated along axis 0), "transpose" (of a matrix), or "1x1" (a matrix on disk, a
    1x1 convolution in the network).
    """

    names: tuple
    how: str

    def shape(self, tensors: dict) -> tuple | None:
        """Shape the parameter would have, or None if a tensor is missing or not of the right kind."""
        if any(name not in tensors for name in self.names):
            return None
        shape = tensors[self.names[0]].shape
        if self.how == "stack":
            # Of equal shapes only: queries, keys and values of other sizes would be cut apart in the wrong places.
            alike = shape and all(tensors[name].shape == shape for name in self.names)
            return (len(self.names) * shape[0],) + shape[1:] if alike else None
        return {"copy": shape, "transpose": shape[::-1], "1x1": shape + (1, 1)}[self.how]

    def disassemble(self, shape: tuple) -> dict:
        """Name -> (shape on disk, function from the parameter to the tensor on disk).

        The inverse of `ldm.checkpoints.loading.assemble`.
        """
        if self.how == "stack":
            rows = shape[0] // len(self.names)
            return {name: ((rows,) + shape[1:], lambda value, i=i: value[i * rows : (i + 1) * rows])
                    for i, name in enumerate(self.names)}
        if self.how == "transpose":
            return {self.names[0]: (shape[::-1], lambda value: value.T.copy())}
        if self.how == "1x1":
            return {self.names[0]: (shape[:-2], lambda value: value.reshape(shape[:-2]))}
        return {self.names[0]: (shape, lambda value: value)}


@dataclass(frozen=True)
class Layout:
    """How one part of a network is named in one kind of file.

    Attributes:
        prefix: put before every name.
        renames: (pattern, replacement) applied in order to a parameter's path, as by re.sub.
        stacked: a pattern and the replacements that name the tensors stacked into that parameter, or None. It is
            matched after `renames`.
        transposed: pattern of paths stored transposed.
        flattened: pattern of paths that are 1x1 convolutions here and matrices on disk.
        ignored: pattern of names on disk (prefix included) that carry nothing: indices and schedule buffers.
    """

    prefix: str = ""
    renames: tuple = ()
    stacked: tuple | None = None
    transposed: str = r"(?!)"
    flattened: str = r"(?!)"
    ignored: str = r"(?!)"

    def source(self, path: str) -> Source:
        """The tensors on disk that make the parameter at `path` in the network."""
        name = path
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        if self.stacked and re.search(self.stacked[0], name):
            return Source(tuple(self.prefix + re.sub(self.stacked[0], to, name) for to in self.stacked[1]), "stack")
        how = "transpose" if re.search(self.transposed, path) else "1x1" if re.search(self.flattened, path) else "copy"
        return Source((self.prefix + name,), how)
