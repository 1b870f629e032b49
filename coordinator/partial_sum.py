"""The weighted sum of a module's first contributions, on disk, and the flat files that contributions are read from.

Files are read chunk by chunk and not mapped, so that nothing of them lingers in the resident set.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from coordinator.outer import Chunk, add_weighted
from model import tensor_file
from model.layout import TensorSpec

CHUNK_ELEMENTS = 1 << 18

# A contribution: its weight and its tensor file (start minus end; for `assign` the end itself).
Contribution = tuple[float, Path]


class FlatFile:
    """The flat float32 vector of a tensor file that was checked against its specs; holds no descriptor."""

    def __init__(self, path: Path, tensors: Sequence[TensorSpec]) -> None:
        tensor_file.open_flat(path, tensors)
        self._path = path
        self._start = len(tensor_file.header_bytes(tensors))

    def read(self, first: int, count: int) -> Chunk:
        return _read(self._path, first, count, self._start)


def _read(path: Path, first: int, count: int, start: int = 0) -> Chunk:
    """Elements `first` .. `first + count` of the float32 vector that begins at byte `start`, (C)."""
    chunk = np.fromfile(path, dtype="<f4", count=count, offset=start + 4 * first)
    if chunk.size != count:
        raise tensor_file.TensorMismatch(f"{path.name} ends {count - chunk.size} elements early")
    return chunk


def chunk_spans(elements: int, chunk_elements: int) -> list[tuple[int, int]]:
    """(first, count) of every chunk."""
    return [(first, min(chunk_elements, elements - first)) for first in range(0, elements, chunk_elements)]


class PartialSum:
    """The weighted sum of the first contributions to one module, in a scratch file of the module's size."""

    def __init__(self, path: Path, tensors: Sequence[TensorSpec], chunk_elements: int = CHUNK_ELEMENTS) -> None:
        self.tensors = tuple(tensors)
        self.contributions: list[Contribution] = []
        self._path = path
        self._spans = chunk_spans(tensor_file.num_elements(self.tensors), chunk_elements)

    @np.errstate(over="ignore", invalid="ignore")  # the step refuses what overflows
    def add(self, weight: float, path: Path) -> None:
        """Add the next contribution in shard order. After a failure the sum is empty: nothing half added is kept."""
        outer_gradient = FlatFile(path, self.tensors)
        try:
            with self._path.open("r+b" if self.contributions else "wb") as file:
                for first, count in self._spans:
                    total = self.read(first, count) if self.contributions else None
                    file.seek(4 * first)
                    file.write(add_weighted(total, outer_gradient.read(first, count), weight).data)
        except BaseException:
            self.remove()
            raise
        self.contributions.append((weight, path))

    def read(self, first: int, count: int) -> Chunk:
        """A chunk of the sum; there must be a contribution in it."""
        return _read(self._path, first, count)

    def remove(self) -> None:
        """Empty the sum and delete its file."""
        self.contributions.clear()
        self._path.unlink(missing_ok=True)
