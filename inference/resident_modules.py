"""Modules in memory ready to be run, least recently used dropped first, bounded in bytes; read by digest from a store.

In float32 on a CPU a module is a map of its file: memory is shared with the file system's cache and with other
processes, and nothing is read before it is needed. Otherwise it is read once and kept in the precision it is served in.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch
from torch import Tensor

from configs.schema import ModelConfig
from inference.level_module import LevelModule, level_bytes, level_module
from inference.module_cache import verify_module
from inference.precision import Precision
from model import tensor_file
from model.layout import level_tensors
from model.store import BlobStore
from model.topology import Topology


class ResidentModules:
    """Modules of one model by blob digest, whatever snapshot names them.

    A module larger than the budget is read every time it is asked for. The bytes of a blob are held against its digest
    when it is first read. Not for several threads at once.
    """

    def __init__(
        self,
        store: BlobStore,
        config: ModelConfig,
        vocab_size: int,
        topology: Topology,
        budget_bytes: int,
        precision: Precision = "float32",
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.vocab_size, self.topology = config, vocab_size, topology
        self.budget_bytes, self.precision, self.device = budget_bytes, precision, torch.device(device)
        self.level_bytes = [level_bytes(config, vocab_size, level, precision) for level in topology.levels]
        self._store = store
        self._specs = [level_tensors(config, vocab_size, level) for level in topology.levels]
        self._modules: OrderedDict[str, LevelModule] = OrderedDict()
        self._verified: set[str] = set()
        self.num_bytes = 0
        self.reads = 0
        self.hits = 0

    def get(self, level: int, module_id: str, digest: str) -> LevelModule:
        """The module, to be read only; raises UnknownBlob, DamagedModule or TensorMismatch."""
        if digest in self._modules:
            self._modules.move_to_end(digest)
            self.hits += 1
            return self._modules[digest]
        if digest not in self._verified:
            verify_module(self._store, module_id, digest)
            self._verified.add(digest)
        size = self.level_bytes[level]
        if size <= self.budget_bytes:
            self._make_room(size)
        module = level_module(
            self._read(level, digest), self._specs[level], self.topology.levels[level], size, self.precision
        )
        self.reads += 1
        if size <= self.budget_bytes:
            self._modules[digest] = module
            self.num_bytes += size
        return module

    def holds(self, digest: str) -> bool:
        """Whether the module is in memory now."""
        return digest in self._modules

    def _read(self, level: int, digest: str) -> Tensor:
        path, specs = self._store.path(digest), self._specs[level]
        start = tensor_file.check(path, specs)
        flat = np.memmap(path, dtype="<f4", mode="c", offset=start, shape=(tensor_file.num_elements(specs),))
        return torch.from_numpy(flat).to(self.device)

    def _make_room(self, size: int) -> None:
        """Before the module is read, so that the budget holds at every instant."""
        while self._modules and self.num_bytes + size > self.budget_bytes:
            _, dropped = self._modules.popitem(last=False)
            self.num_bytes -= dropped.num_bytes
