"""A 2 x 2 mixture of a tiny model with four different paths, in a blob store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.schema import LevelConfig, ModelConfig, TopologyConfig
from inference.module_cache import ModuleCache
from inference.path_source import PathSource
from model.initial import write_initial_module
from model.layout import module_spec
from model.path import load_path
from model.store import BlobStore
from model.topology import Topology
from model.transformer import PathModel
from routing.router import RouteState

VOCAB_SIZE = 40
SEQUENCE_LENGTH = 64
TWO_BY_TWO = [LevelConfig(modules=2, blocks=[0, 1], embedding=True), LevelConfig(modules=2, blocks=[2, 3], head=True)]


@dataclass
class Mixture:
    """Modules that differ from one another, and ways to read them."""

    config: ModelConfig
    topology: Topology
    store: BlobStore
    digests: dict[str, str]
    paths: dict[int, PathModel] = field(default_factory=dict)

    def source(self, budget_bytes: int = 1 << 30) -> PathSource:
        cache = ModuleCache(self.store, budget_bytes)
        paths = (self.topology.modules_of_path(path_index) for path_index in range(self.topology.num_paths))
        digests = [[self.digests[module_id] for module_id in path] for path in paths]
        return PathSource(self.config, VOCAB_SIZE, self.topology, digests, cache)

    def path(self, path_index: int) -> PathModel:
        """The path composed for itself, without cache or engine."""
        modules = self.topology.modules_of_path(path_index)
        files = {module_id: self.store.path(self.digests[module_id]) for module_id in modules}
        return load_path(self.config, VOCAB_SIZE, self.topology, files)

    @torch.no_grad()
    def logits(self, path_index: int, tokens: list[int]) -> np.ndarray:
        """Scores after the last token, by a plain forward pass over all of them."""
        if path_index not in self.paths:
            self.paths[path_index] = self.path(path_index)
        path = self.paths[path_index]
        scores: np.ndarray = path.logits(path(torch.tensor([tokens]))[0, -1]).numpy()
        return scores


@dataclass
class Script:
    """A router that follows a table: how many tokens (BOS apart) it looked at -> path. Remembers the looks."""

    table: Callable[[int], int]
    num_paths: int = 4
    version: str = "script"

    def __post_init__(self) -> None:
        self.looks: list[int] = []

    def route(self, tokens: np.ndarray, state: RouteState | None = None) -> tuple[np.ndarray, RouteState]:
        self.looks.append(len(tokens) - 1)
        posterior = np.zeros(self.num_paths)
        posterior[self.table(len(tokens) - 1)] = 1.0
        return posterior, RouteState(len(tokens) - 1)


@pytest.fixture
def make_mixture(tmp_path: Path) -> Callable[..., Mixture]:
    def make(levels: list[LevelConfig] | None = None, **changes: Any) -> Mixture:
        shape: dict[str, Any] = {
            "blocks": 4,
            "hidden_size": 32,
            "heads": 4,
            "kv_heads": 2,
            "intermediate_size": 48,
            "sequence_length": SEQUENCE_LENGTH,
            "qk_norm": True,
            "init_std": 0.3,
        }
        config = ModelConfig(**(shape | changes))
        topology = Topology.from_config(TopologyConfig(levels=levels or TWO_BY_TWO))
        store = BlobStore(tmp_path / "blobs")
        digests = {}
        for seed, module_id in enumerate(topology.module_ids):
            file = store.scratch() / "module"
            digest, _ = write_initial_module(file, module_spec(config, VOCAB_SIZE, topology, module_id), config, seed)
            store.adopt(file, digest)
            digests[module_id] = digest
        return Mixture(config, topology, store, digests)

    return make


@pytest.fixture
def mixture(make_mixture: Callable[..., Mixture]) -> Mixture:
    return make_mixture()
