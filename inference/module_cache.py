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
from model.store import BlobStore


class ModuleCache:
    """Tensors of modules by blob digest. A module larger than the budget is read every time it is asked for."""

    def __init__(self, store: BlobStore, budget_bytes: int, device: torch.device | str = "cpu") -> None:
        self._store = store
        self._budget_bytes = budget_bytes
        self._device = device
        self._modules: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._bytes = 0
        self.reads = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the modules held now; those of a path in use may be dropped here and still live with it."""
        return self._bytes

    def get(self, digest: str, specs: Sequence[TensorSpec]) -> dict[str, Tensor]:
        """The module's tensors, to be read only; raises UnknownBlob or TensorMismatch."""
        if digest in self._modules:
            self._modules.move_to_end(digest)
            return self._modules[digest]
        self._store.size(digest)
        views = tensor_file.read(self._store.path(digest), specs)
        module = {name: torch.from_numpy(np.array(view)).to(self._device) for name, view in views.items()}
        self.reads += 1
        self._keep(digest, module)
        return module

    def _keep(self, digest: str, module: dict[str, Tensor]) -> None:
        size = _num_bytes(module)
        if size > self._budget_bytes:
            return
        while self._bytes + size > self._budget_bytes:
            _, dropped = self._modules.popitem(last=False)
            self._bytes -= _num_bytes(dropped)
        self._modules[digest] = module
        self._bytes += size


def _num_bytes(module: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in module.values())
