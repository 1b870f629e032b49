"""Rungs of the equivalence ladder without a wire: tasks as functions, the executor on files, and the references."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.schema import Experiment
from coordinator.executor import Executor
from coordinator.outer import contribution_weights
from corpus.token_file import SequenceIndex, TokenFile, write_token_file
from model import tensor_file
from model.initial import write_initial_module
from model.layout import module_spec
from model.store import BlobStore
from model.topology import Topology
from protocol.tasks import BlobRef, ModuleRef, Numerics, PathRef, TrainSpec
from tests.equivalence.reference import Loop, diloco, plain_training, shard_batches
from worker.outcome import TaskOutcome
from worker.train import run_train

VOCAB_SIZE = 64
PRETRAIN_STEPS, PHASES, INNER_STEPS = 6, 3, 3
ORDER_SEED = 11


def _experiment(outer: Mapping[str, Any], replicas: int = 1, **inner: Any) -> Experiment:
    return Experiment.model_validate(
        {
            "model": {
                "blocks": 2,
                "hidden_size": 16,
                "heads": 2,
                "intermediate_size": 32,
                "sequence_length": 64,
                "qk_norm": True,
            },
            "topology": {
                "levels": [
                    {"modules": 1, "blocks": [0], "embedding": True},
                    {"modules": 1, "blocks": [1], "head": True},
                ],
                "replicas": replicas,
            },
            "sharding": {"kind": "random"},
            "inner": {"learning_rate": 1e-2, "warmup_steps": 3, "batch_rows": 4} | inner,
            "outer": outer,
            "stages": [
                {"kind": "pretrain", "steps": PRETRAIN_STEPS, "inner_steps": PRETRAIN_STEPS},
                {"kind": "shard"},
                {"kind": "train", "phases": PHASES, "inner_steps": INNER_STEPS},
            ],
        }
    )


def _write_shard(path: Path, sequences: int, seed: int) -> Path:
    """Sequences in which the next token is likely: something to learn, different in every shard."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(20, 65, sequences)
    index = SequenceIndex(
        np.arange(sequences, dtype=np.uint64),
        lengths.astype(np.uint32),
        np.zeros(sequences, np.uint16),
        np.zeros(sequences, np.uint64),
        ("prose",),
    )
    tokens = (((np.arange(length) * (seed + 3)) % (VOCAB_SIZE - 2) + 2).astype(np.uint16) for length in lengths)
    write_token_file(path, index, "uint16", tokens)
    return path


@dataclass
class Files:
    """A run without a coordinator: module versions in a store, inner states by shard, the executor between them."""

    root: Path
    experiment: Experiment
    shards: list[TokenFile]

    def __post_init__(self) -> None:
        torch.set_num_threads(1)
        self.store = BlobStore(self.root / "blobs")
        self.executor = Executor(self.store, self.root / "sums", chunk_elements=1000)
        self.topology = Topology.from_config(self.experiment.topology).dense()
        self.specs = {m: module_spec(self.experiment.model, VOCAB_SIZE, self.topology, m) for m in ("0.0", "1.0")}
        self.params: dict[str, Path] = {}
        self.momentum: dict[str, Path | None] = dict.fromkeys(self.specs)
        for module_id, spec in self.specs.items():
            aside = self.store.scratch() / "module"
            digest, _ = write_initial_module(aside, spec, self.experiment.model, seed=5)
            self.store.adopt(aside, digest)
            self.params[module_id] = self.store.path(digest)

    def tensors(self) -> dict[str, np.ndarray]:
        return {name: tensor for path in self.params.values() for name, tensor in tensor_file.read(path).items()}

    def batches(self, shard: int) -> Any:
        return shard_batches([self.shards[shard]], self.experiment, ORDER_SEED + shard)

    def tokens(self, shard: int) -> int:
        return int(self.shards[shard].lengths.sum())

    def task(
        self, model: str, shard: int, steps: int, first_step: int, shard_step: int, state: Path | None, adam_step: int
    ) -> TaskOutcome:
        """One TRAIN task on the newest versions, its module outputs moved into the store."""
        out_dir = self.root / f"{model}-{shard}-{first_step}"
        out_dir.mkdir()
        refs = [ModuleRef(module_id=m, version=0, blob=_blob(path)) for m, path in self.params.items()]
        spec = TrainSpec(
            path=PathRef(model=model, path_index=0, modules=refs),
            shard=shard,
            tokens=[BlobRef(digest="0" * 64, size=0)],
            inner_state=None,
            adam_step=adam_step,
            phase=0,
            first_step=first_step,
            steps=steps,
            total_steps=self.experiment.total_steps,
            shard_step=shard_step,
            order_seed=ORDER_SEED + shard,
            outer="assign" if model == "base" else self.experiment.outer.kind,
            numerics=Numerics(device="cpu", dtype="float32"),
        )
        outcome = run_train(
            spec, self.experiment, VOCAB_SIZE, self.params, [self.root / f"shard-{shard}"], state, out_dir
        )
        for module_id in self.specs:
            self.store.adopt(outcome.files[module_id], outcome.result.outputs[module_id].digest)
        return outcome


def _blob(path: Path) -> BlobRef:
    return BlobRef(digest=path.name, size=path.stat().st_size)


@pytest.fixture
def files(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Files]:
    """A run with one shard a replica; the shards differ in size and content."""
    experiment: Experiment = request.param
    with ExitStack() as stack:
        shards = [
            stack.enter_context(TokenFile.open(_write_shard(tmp_path / f"shard-{shard}", 30 - 8 * shard, seed=shard)))
            for shard in range(experiment.topology.replicas)
        ]
        yield Files(tmp_path, experiment, shards)


def _pretrain(files: Files, steps_of_tasks: list[int]) -> tuple[Path | None, list[float]]:
    """Plain training (`assign`) in tasks of these lengths; returns the last inner state and all losses."""
    state, done, losses = None, 0, list[float]()
    for version, steps in enumerate(steps_of_tasks):
        outcome = files.task("base", 0, steps, done, done, state, done)
        for module_id, spec in files.specs.items():
            contribution = (1.0, files.store.path(outcome.result.outputs[module_id].digest))
            stepped = files.executor.step(
                ("base", module_id),
                version,
                spec,
                files.params[module_id],
                None,
                [contribution],
                files.experiment.outer.model_copy(update={"kind": "assign"}),
            )
            files.params[module_id] = files.store.path(stepped.params[0])
        state, done, losses = outcome.files["inner_state"], done + steps, losses + outcome.result.step_losses
    return state, losses


def _train(files: Files, base_state: Path | None, arrival: random.Random) -> None:
    """DiLoCo: every shard, then one outer step a module, contributions arriving in any order."""
    shards = range(files.experiment.topology.replicas)
    states = dict.fromkeys(shards, base_state)
    weights = contribution_weights([files.tokens(shard) for shard in shards])
    for phase in range(PHASES):
        done = phase * INNER_STEPS
        outcomes = {
            shard: files.task(
                "mixture", shard, INNER_STEPS, PRETRAIN_STEPS + done, done, states[shard], PRETRAIN_STEPS + done
            )
            for shard in shards
        }
        states = {shard: outcome.files["inner_state"] for shard, outcome in outcomes.items()}
        for module_id, spec in files.specs.items():
            key = ("mixture", module_id)
            paths = [files.store.path(outcomes[shard].result.outputs[module_id].digest) for shard in shards]
            for shard in arrival.sample(shards, len(shards)):
                files.executor.add(key, phase, shards, shard, weights[shard], paths[shard])
            contributions = list(zip(weights, paths, strict=True))
            stepped = files.executor.step(
                key,
                phase,
                spec,
                files.params[module_id],
                files.momentum[module_id],
                contributions,
                files.experiment.outer,
            )
            assert stepped.momentum is not None
            files.params[module_id] = files.store.path(stepped.params[0])
            files.momentum[module_id] = files.store.path(stepped.momentum[0])


PLAIN = _experiment({"kind": "assign"})


@pytest.mark.parametrize("files", [PLAIN], indirect=True)
@pytest.mark.parametrize("steps_of_tasks", [[6], [2, 2, 2], [1, 5]])
def test_plain_training_in_tasks_is_plain_training_bit_for_bit(files: Files, steps_of_tasks: list[int]) -> None:
    loop = Loop(files.experiment, VOCAB_SIZE, files.tensors(), files.batches(0))
    expected = plain_training(loop, PRETRAIN_STEPS)
    start = files.tensors()
    _, losses = _pretrain(files, steps_of_tasks)
    assert losses == loop.losses
    assert losses[-1] < losses[0]
    for name, tensor in files.tensors().items():
        assert tensor.tobytes() == expected[name].numpy().tobytes(), name
        assert np.any(tensor != start[name]), f"{name} did not move"


@pytest.mark.parametrize(
    "files",
    [
        pytest.param(_experiment({"kind": "nesterov"}), id="P=1"),
        pytest.param(_experiment({"kind": "nesterov"}, replicas=3), id="P=3"),
        pytest.param(_experiment({"kind": "nesterov", "rescale": "sqrt", "learning_rate": 0.3}, replicas=3), id="sqrt"),
        pytest.param(_experiment({"kind": "nesterov", "momentum": 0.5}, replicas=2), id="P=2"),
    ],
    indirect=True,
)
def test_diloco_in_tasks_equals_torch_sgd_nesterov_as_the_outer_optimizer(files: Files) -> None:
    shards = [(files.batches(shard), files.tokens(shard)) for shard in range(files.experiment.topology.replicas)]
    base = Loop(files.experiment, VOCAB_SIZE, files.tensors(), files.batches(0))
    plain_training(base, PRETRAIN_STEPS)
    expected = diloco(base, shards, files.experiment, PHASES, INNER_STEPS)

    state, _ = _pretrain(files, [PRETRAIN_STEPS])
    forked = files.tensors()
    _train(files, state, random.Random(0))
    for name, tensor in files.tensors().items():
        np.testing.assert_allclose(tensor, expected[name].numpy(), rtol=0, atol=1e-6, err_msg=name)
        assert np.abs(tensor - forked[name]).max() > 1e-4, f"{name} did not move"
