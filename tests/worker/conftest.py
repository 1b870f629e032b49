"""A tiny run on disk: a token file, the modules of its paths, and specs of tasks on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.schema import Experiment
from corpus.token_file import SequenceIndex, write_token_file
from model.initial import write_initial_module
from model.layout import module_spec
from model.store import file_digest
from protocol.tasks import BlobRef, ModuleRef, Numerics, PathRef, TrainSpec
from worker.task_path import topology_of

VOCAB_SIZE = 96
SEQUENCE_LENGTH = 128


def blob_ref(path: Path) -> BlobRef:
    digest, size = file_digest(path)
    return BlobRef(digest=digest, size=size)


@dataclass
class TinyRun:
    """Files of a run and the specs that name them."""

    root: Path
    experiment: Experiment
    tokens: Path
    modules: dict[str, Path] = field(default_factory=dict)
    vocab_size: int = VOCAB_SIZE

    def add_modules(self, model: str, path_index: int = 0, seed: int = 1) -> PathRef:
        """Write the modules of one path of a model."""
        topology = topology_of(self.experiment, model)
        refs = []
        for module_id in topology.modules_of_path(path_index):
            file = self.root / f"{model}-{module_id}"
            spec = module_spec(self.experiment.model, self.vocab_size, topology, module_id)
            write_initial_module(file, spec, self.experiment.model, seed)
            self.modules[module_id] = file
            refs.append(ModuleRef(module_id=module_id, version=0, blob=blob_ref(file)))
        return PathRef(model=model, path_index=path_index, modules=refs)

    def train_spec(self, path: PathRef, **changes: Any) -> TrainSpec:
        values: dict[str, Any] = {
            "path": path,
            "shard": 0,
            "tokens": [blob_ref(self.tokens)],
            "inner_state": None,
            "adam_step": 0,
            "phase": 0,
            "first_step": 0,
            "steps": 4,
            "total_steps": 20,
            "shard_step": 0,
            "order_seed": 7,
            "outer": "nesterov",
            "numerics": Numerics(device="cpu"),
        }
        return TrainSpec(**(values | changes))


def tiny_experiment(**changes: Any) -> Experiment:
    """Two levels of two modules, a block each; quick to train."""
    document: dict[str, Any] = {
        "model": {
            "blocks": 2,
            "hidden_size": 32,
            "heads": 4,
            "kv_heads": 2,
            "intermediate_size": 64,
            "sequence_length": SEQUENCE_LENGTH,
            "tie_embeddings": False,
        },
        "topology": {
            "levels": [
                {"modules": 2, "blocks": [0], "embedding": True},
                {"modules": 2, "blocks": [1], "head": True},
            ]
        },
        "inner": {"learning_rate": 3e-3, "warmup_steps": 3, "batch_rows": 4},
        "stages": [
            {"kind": "pretrain", "steps": 8, "inner_steps": 4},
            {"kind": "shard"},
            {"kind": "train", "phases": 2, "inner_steps": 4},
        ],
    }
    for key, value in changes.items():
        document[key] = document.get(key, {}) | value
    return Experiment.model_validate(document)


def write_token_lengths(path: Path, lengths: list[int], seed: int = 0) -> None:
    """A token file of random sequences, BOS first."""
    generator = np.random.default_rng(seed)
    count = len(lengths)
    index = SequenceIndex(
        ids=np.arange(count, dtype=np.uint64) + np.uint64(5 << 32),
        lengths=np.array(lengths, np.uint32),
        domains=(np.arange(count) % 2).astype(np.uint16),
        documents=np.arange(count, dtype=np.uint64),
        domain_names=("code", "prose"),
    )
    sequences = (np.append([0], generator.integers(2, VOCAB_SIZE, length - 1)).astype(np.uint16) for length in lengths)
    write_token_file(path, index, "uint16", sequences)


MakeRun = Callable[..., TinyRun]
BlobOf = Callable[[Path], BlobRef]


@pytest.fixture
def blob() -> BlobOf:
    """The reference of a file."""
    return blob_ref


@pytest.fixture
def write_tokens() -> Callable[..., None]:
    """Writes a token file of random sequences of these lengths."""
    return write_token_lengths


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Make a tiny run; keyword arguments change sections of its experiment."""

    def make(**changes: Any) -> TinyRun:
        tokens = tmp_path / "tokens"
        lengths = [SEQUENCE_LENGTH, 64, 63, *np.random.default_rng(3).integers(20, SEQUENCE_LENGTH + 1, 40).tolist()]
        write_token_lengths(tokens, lengths)
        return TinyRun(tmp_path, tiny_experiment(**changes), tokens)

    return make


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
