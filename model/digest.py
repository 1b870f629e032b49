"""One number for what was trained: the digest of a module's weights and of a whole run's.

Independent of how files are laid out, so that an export or another store can be compared. Streams; torch-free.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from model import tensor_file

_CHUNK_ELEMENTS = 1 << 20


def tensors_digest(tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over (name, dtype, shape, little-endian bytes) of float32 tensors, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        shape = ",".join(str(size) for size in tensor.shape)
        digest.update(f"{name}\0{tensor.dtype.name}\0{shape}\0".encode())
        flat = tensor.reshape(-1)
        for start in range(0, flat.size, _CHUNK_ELEMENTS):
            digest.update(np.ascontiguousarray(flat[start : start + _CHUNK_ELEMENTS], dtype="<f4").data)
    return digest.hexdigest()


def module_digest(path: Path) -> str:
    """The digest of the weights in a module's file."""
    return tensors_digest(tensor_file.read(path))


def run_digest(modules: Iterable[tuple[str, int, str]]) -> str:
    """SHA-256 over sorted (module id, version, module digest); ids name the model too where a run has several."""
    digest = hashlib.sha256()
    for module_id, version, weights in sorted(modules):
        digest.update(f"{module_id}\0{version}\0{weights}\0".encode())
    return digest.hexdigest()
