"""Modules in memory, least recently used dropped first, bounded in bytes; read from a blob store.

Bounded by a weight budget, not by the number of paths: a mixture of any size is served path by path.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from model import tensor_file
from model.layout import TensorSpec
from model.store import BlobMismatch, BlobStore


class DamagedModule(ValueError):
    """A module's file no longer has the bytes that it is named by."""


def verify_module(store: BlobStore, module_id: str, digest: str) -> None:
    """Read the module's blob whole; raises UnknownBlob where it is absent, DamagedModule where it changed."""
    store.size(digest)
    try:
        store.verify(digest)
    except BlobMismatch:
        raise DamagedModule(
            f"module {module_id} is damaged: blob {store.known_path(digest)} holds other bytes than its digest names; "
            "put back the file of that name from a copy of the run directory or from a worker's cache"
        ) from None


class ModuleCache:
    """Tensors of modules by blob digest. A module larger than the budget is read every time it is asked for.

    The bytes of a blob are held against its digest when it is first read.
    """

    def __init__(self, store: BlobStore, budget_bytes: int, device: torch.device | str = "cpu") -> None:
        self.store = store
        self.budget_bytes = budget_bytes
        self._device = device
        self._modules: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._bytes = 0
        self._verified: set[str] = set()
        self.reads = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the modules held now; those of a path in use may be dropped here and still live with it."""
        return self._bytes

    def get(self, module_id: str, digest: str, specs: Sequence[TensorSpec]) -> dict[str, Tensor]:
        """The module's tensors, to be read only; raises UnknownBlob, DamagedModule or TensorMismatch."""
        if digest in self._modules:
            self._modules.move_to_end(digest)
            return self._modules[digest]
        if digest not in self._verified:
            verify_module(self.store, module_id, digest)
            self._verified.add(digest)
        views = tensor_file.read(self.store.path(digest), specs)
        module = {name: torch.from_numpy(np.array(view)).to(self._device) for name, view in views.items()}
        self.reads += 1
        self._keep(digest, module)
        return module

    def _keep(self, digest: str, module: dict[str, Tensor]) -> None:
        size = _num_bytes(module)
        if size > self.budget_bytes:
            return
        while self._bytes + size > self.budget_bytes:
            _, dropped = self._modules.popitem(last=False)
            self._bytes -= _num_bytes(dropped)
        self._modules[digest] = module
        self._bytes += size


def _num_bytes(module: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in module.values())
