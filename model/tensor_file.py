"""Float32 tensors at rest: a safetensors file whose data region is the tensors end to end, sorted by name.

One form per set of tensors: no metadata, compact JSON, header padded with spaces to a multiple of 8, little-endian.
Equal tensors are equal bytes on every machine, and a module is one flat float32 vector after its header. Torch-free.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from model.layout import TensorSpec

# A tensor by name and shape, as a spec of a module or as a plain pair.
NamedShape = TensorSpec | tuple[str, tuple[int, ...]]

_MAX_HEADER_BYTES = 100_000_000
_LENGTH_BYTES = 8


class TensorMismatch(ValueError):
    """A file or an array that does not hold the tensors it should; the message names the first that differs."""


def _shapes(tensors: Sequence[NamedShape]) -> dict[str, tuple[int, ...]]:
    """Shapes by name, in the order of the names."""
    pairs = [(item.name, item.shape) if isinstance(item, TensorSpec) else item for item in tensors]
    shapes = {name: tuple(int(size) for size in shape) for name, shape in sorted(pairs)}
    if len(shapes) != len(pairs):
        raise TensorMismatch("two tensors have the same name")
    return shapes


def num_elements(tensors: Sequence[NamedShape]) -> int:
    """Elements of all tensors together: the length of the flat data region."""
    return sum(math.prod(shape) for shape in _shapes(tensors).values())


def header_bytes(tensors: Sequence[NamedShape]) -> bytes:
    """Everything in the file before the data: the length (u64) and the padded JSON header."""
    header, offset = {}, 0
    for name, shape in _shapes(tensors).items():
        end = offset + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


class Writer:
    """Writes a tensor file chunk by chunk in the order of the flat vector, hashing on the way."""

    def __init__(self, path: Path, specs: Sequence[NamedShape]) -> None:
        self._path = path
        self._missing = num_elements(specs)
        self._hash = hashlib.sha256()
        self._size = 0
        self._file = path.open("wb")
        self._write(header_bytes(specs))

    def append(self, flat_chunk: np.ndarray) -> None:
        """Add the next elements of the flat float32 vector; raises TensorMismatch where there are too many."""
        if flat_chunk.dtype != np.float32:
            raise TensorMismatch(f"{self._path.name} takes float32, not {flat_chunk.dtype}")
        self._missing -= flat_chunk.size
        if self._missing < 0:
            raise TensorMismatch(f"{self._path.name} is given {-self._missing} elements more than its tensors have")
        self._write(np.ascontiguousarray(flat_chunk, dtype="<f4").reshape(-1).view(np.uint8).data)

    def finish(self) -> tuple[str, int]:
        """Make the file durable; returns (SHA-256 hex, size in bytes). Raises TensorMismatch where elements miss."""
        if self._missing:
            raise TensorMismatch(f"{self._path.name} is finished with {self._missing} elements missing")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._hash.hexdigest(), self._size

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file; after an error, remove it too."""
        self._file.close()
        if kind is not None:
            self._path.unlink(missing_ok=True)

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._size += len(data)


def write(path: Path, tensors: Mapping[str, np.ndarray]) -> tuple[str, int]:
    """Write float32 tensors; returns (SHA-256 hex, size in bytes)."""
    with Writer(path, [(name, tensor.shape) for name, tensor in tensors.items()]) as writer:
        for name in sorted(tensors):
            writer.append(tensors[name])
        return writer.finish()


def open_flat(path: Path, specs: Sequence[NamedShape]) -> np.memmap[Any, np.dtype[np.float32]]:
    """The data region as one read-only float32 vector in a memory map, after the header was checked against `specs`.

    Raises TensorMismatch naming what differs: a tensor, its shape or dtype, the size of the file.
    """
    start, elements = check(path, specs), num_elements(specs)
    return np.memmap(path, dtype="<f4", mode="r", offset=start, shape=(elements,))


def check(path: Path, specs: Sequence[NamedShape]) -> int:
    """Compare header and size with `specs`; returns where the data starts. Raises TensorMismatch as `open_flat`."""
    expected = header_bytes(specs)
    with path.open("rb") as file:
        found = file.read(len(expected))
    if found != expected:
        _explain_difference(path, specs)
    size, expected_size = path.stat().st_size, len(expected) + 4 * num_elements(specs)
    if size != expected_size:
        raise TensorMismatch(f"{path.name} has {size} bytes, expected {expected_size}")
    return len(expected)


def read(path: Path, specs: Sequence[NamedShape] | None = None) -> dict[str, np.ndarray]:
    """All tensors by name, as views of a private (copy-on-write) memory map; checked against `specs` if given."""
    if specs is not None:
        check(path, specs)
    header, start = _parse_header(path)
    size = path.stat().st_size
    data = np.memmap(path, dtype=np.uint8, mode="c", offset=start, shape=(size - start,))
    return {name: _view(path, data, name, header[name]) for name in sorted(header)}


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of the file, in its order, from the header alone."""
    header, _ = _parse_header(path)
    return {name: tuple(header[name]["shape"]) for name in sorted(header)}


def _parse_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The header of a tensor file and where its data starts; raises TensorMismatch where it is none."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if length > min(_MAX_HEADER_BYTES, path.stat().st_size - _LENGTH_BYTES):
            raise TensorMismatch(f"{path.name} is not a tensor file: its header would have {length} bytes")
        text = file.read(length)
    try:
        header = json.loads(text)
        for name, entry in header.items():
            _check_entry(path, name, entry)
    except (AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TensorMismatch(f"{path.name} is not a tensor file: {error}") from None
    return header, _LENGTH_BYTES + length


def _check_entry(path: Path, name: str, entry: Any) -> None:
    """Raise TensorMismatch unless a header's entry describes a float32 tensor and the bytes it lies at."""
    match entry:
        case {"dtype": "F32", "shape": [*shape], "data_offsets": [int(begin), int(end)]} if all(
            isinstance(size, int) and size >= 0 for size in shape
        ):
            if begin < 0 or end - begin != 4 * math.prod(shape):
                raise TensorMismatch(f"{path.name}: {name} of shape {shape} lies at bytes {begin}..{end}")
        case _:
            raise TensorMismatch(f"{path.name}: {name} is {entry}, expected dtype F32, a shape and data_offsets")


def _view(path: Path, data: np.ndarray, name: str, entry: Mapping[str, Any]) -> np.ndarray:
    begin, end = entry["data_offsets"]
    if end > data.size:
        raise TensorMismatch(f"{path.name} ends before {name}: {data.size} bytes of data, {end} expected")
    view: np.ndarray = data[begin:end].view("<f4").reshape(entry["shape"])
    return view


def _explain_difference(path: Path, specs: Sequence[NamedShape]) -> None:
    """Raise TensorMismatch for the first difference between the file's header and `specs`."""
    expected, found = _shapes(specs), shapes(path)
    if missing := sorted(expected.keys() - found.keys()):
        raise TensorMismatch(f"{path.name} lacks {missing[0]} ({len(missing)} tensors in all)")
    if unknown := sorted(found.keys() - expected.keys()):
        raise TensorMismatch(f"{path.name} holds {unknown[0]}, which is not expected ({len(unknown)} tensors in all)")
    for name, shape in expected.items():
        if found[name] != shape:
            raise TensorMismatch(f"{path.name}: {name} has shape {found[name]}, expected {shape}")
    raise TensorMismatch(
        f"{path.name} is not in the one accepted form: tensors sorted by name, end to end, no metadata"
    )
