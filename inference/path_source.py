"""The paths of one model as files in a blob store, composed from cached modules when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from configs.schema import ModelConfig
from inference.context import Context
from inference.module_cache import ModuleCache
from model.layout import level_tensors
from model.topology import Topology


class PathSource:
    """Module id -> digest of one phase-complete version of every module, and where to read them."""

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        topology: Topology,
        digests: Mapping[str, str],
        cache: ModuleCache,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self.vocab_size = vocab_size
        self.topology = topology
        self._digests = dict(digests)
        self._cache = cache
        self._device = device
        self._specs = [level_tensors(config, vocab_size, level) for level in topology.levels]

    def context(self) -> Context:
        """An empty context; `use` gives it its first path."""
        return Context(self.config, self.vocab_size, self.topology, self._device)

    def modules(self, path_index: int) -> tuple[tuple[str, ...], dict[str, Tensor]]:
        """(digests of the path's modules, all their tensors); raises UnknownPath and what ModuleCache does."""
        module_ids = self.topology.modules_of_path(path_index)
        digests = tuple(self._digests[module_id] for module_id in module_ids)
        tensors: dict[str, Tensor] = {}
        for module_id, digest, specs in zip(module_ids, digests, self._specs, strict=True):
            tensors |= self._cache.get(module_id, digest, specs)
        return digests, tensors
