"""Modules of a tiny model on disk, each with values of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from configs.schema import LevelConfig, ModelConfig, TopologyConfig
from model.initial import write_initial_module
from model.layout import module_spec
from model.topology import Topology

VOCAB_SIZE = 48
TWO_BY_TWO = [LevelConfig(modules=2, blocks=[0, 1], embedding=True), LevelConfig(modules=2, blocks=[2, 3], head=True)]


def tiny_model(**changes: Any) -> ModelConfig:
    shape: dict[str, Any] = {
        "blocks": 4,
        "hidden_size": 32,
        "heads": 4,
        "intermediate_size": 48,
        "sequence_length": 64,
        "init_std": 0.2,
    }
    return ModelConfig(**(shape | changes))


def topology(levels: Sequence[LevelConfig]) -> Topology:
    return Topology.from_config(TopologyConfig(levels=list(levels)))


@pytest.fixture
def write_modules(tmp_path: Path) -> Callable[[ModelConfig, Topology], dict[str, Path]]:
    """Writes every module of a topology, no two alike."""

    def write(model: ModelConfig, topology: Topology) -> dict[str, Path]:
        files = {}
        for seed, module_id in enumerate(topology.module_ids):
            files[module_id] = tmp_path / module_id
            spec = module_spec(model, VOCAB_SIZE, topology, module_id)
            write_initial_module(files[module_id], spec, model, seed)
        return files

    return write
