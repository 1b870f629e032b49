"""The paths of one model as files in a blob store, composed from cached modules when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from configs.schema import ModelConfig
from inference.context import Context
from inference.module_cache import ModuleCache
from model.layout import level_tensors
from model.topology import Topology


class PathSource:
    """The digests of one phase-complete snapshot of every path, its modules by level, and where to read them.

    Two paths through a module may hold two versions of it.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        topology: Topology,
        digests: Sequence[Sequence[str]],
        cache: ModuleCache,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self.vocab_size = vocab_size
        self.topology = topology
        self._digests = [tuple(path) for path in digests]
        self.cache = cache
        self.device = device
        self._specs = [level_tensors(config, vocab_size, level) for level in topology.levels]

    def context(self) -> Context:
        """An empty context; `use` gives it its first path."""
        return Context(self.config, self.vocab_size, self.topology, self.device)

    def digests(self, path_index: int) -> tuple[str, ...]:
        """Digests of the path's modules, one a level; raises UnknownPath."""
        self.topology.module_indices(path_index)
        return self._digests[path_index]

    def modules(self, path_index: int) -> tuple[tuple[str, ...], dict[str, Tensor]]:
        """(digests of the path's modules, all their tensors); raises UnknownPath and what ModuleCache does."""
        module_ids = self.topology.modules_of_path(path_index)
        digests = self._digests[path_index]
        tensors: dict[str, Tensor] = {}
        for module_id, digest, specs in zip(module_ids, digests, self._specs, strict=True):
            tensors |= self.cache.get(module_id, digest, specs)
        return digests, tensors
