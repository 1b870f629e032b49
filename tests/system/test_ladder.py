"""The equivalence ladder through the whole system: a real coordinator and a real worker over gRPC against plain loops.

One path and `outer: assign` is plain training bit for bit; one module a level and P shards is DiLoCo.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.schema import Config
from coordinator.plan import MIXTURE, Plan
from coordinator.serving import serve_until, write_config
from coordinator.snapshot import RunSnapshot
from corpus.token_file import TokenFile
from model import tensor_file
from model.path import compose
from tests.equivalence.reference import Loop, diloco, plain_training, shard_batches
from worker.loop import run_worker

PHASES, INNER_STEPS = 3, 2


@pytest.fixture(autouse=True)
def _documents(tmp_path: Path, write_documents: Callable[..., None]) -> None:
    write_documents(tmp_path / "documents.jsonl", per_kind=20)


def make_config(tmp_path: Path, outer: dict[str, Any], replicas: int, sharding: str) -> Config:
    return Config.model_validate(
        {
            "name": "ladder",
            "experiment": {
                "seed": 5,
                "corpus": {
                    "source": {"kind": "files", "paths": [str(tmp_path / "documents.jsonl")]},
                    "min_document_characters": 100,
                    "range_characters": 20_000,
                },
                "tokenizer": {"kind": "bytes"},
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
                "sharding": {"kind": sharding},
                "inner": {"learning_rate": 1e-2, "warmup_steps": 2, "batch_rows": 4},
                "outer": outer,
                "stages": [{"kind": "shard"}, {"kind": "train", "phases": PHASES, "inner_steps": INNER_STEPS}],
            },
        }
    )


def carry_out(config: Config, run_dir: Path) -> RunSnapshot:
    """A whole run: the coordinator in a thread, the worker in this one."""
    run_dir.mkdir()
    write_config(config, run_dir)
    address: list[str] = []
    ready = threading.Event()

    def told(where: str) -> None:
        address.append(where)
        ready.set()

    def coordinate() -> None:
        asyncio.run(_serve(config, run_dir, told))

    thread = threading.Thread(target=coordinate)
    thread.start()
    assert ready.wait(60)
    run_worker(address[0], None, run_dir / "cache", threads=1, say=lambda line: None)
    thread.join(60)
    assert not thread.is_alive()
    return RunSnapshot.open(run_dir)


async def _serve(config: Config, run_dir: Path, told: Callable[[str], None]) -> None:
    await serve_until(asyncio.Event(), config, run_dir, "127.0.0.1:0", ready=told, say=lambda line: None)


def trained(snapshot: RunSnapshot) -> dict[str, np.ndarray]:
    """The tensors of the mixture's one path."""
    tensors: dict[str, np.ndarray] = {}
    for _, path in snapshot.modules(MIXTURE).values():
        tensors |= tensor_file.read(path)
    return tensors


def initial(snapshot: RunSnapshot) -> dict[str, np.ndarray]:
    """The base's first weights, made again from the seed."""
    from coordinator.plan import BASE, seed_of
    from model.initial import initial_tensor

    experiment = snapshot.config.experiment
    specs = snapshot.plan.path_tensors(snapshot.state)
    return {s.name: initial_tensor(s, experiment.model, seed_of(experiment.seed, BASE)) for s in specs}


def shard_data(snapshot: RunSnapshot, files: ExitStack) -> list[tuple[Any, int]]:
    """(rows by step, training tokens) of every shard, as the run has them."""
    data = []
    for shard in snapshot.state.shards_of(MIXTURE):
        opened = [files.enter_context(TokenFile.open(snapshot.store.path(ref.digest))) for ref in shard.files]
        batches = shard_batches(opened, snapshot.config.experiment, snapshot.plan.order_seed(MIXTURE, shard.shard, 0))
        data.append((batches, shard.training_tokens))
    return data


def test_one_path_with_assign_is_plain_training_bit_for_bit(tmp_path: Path) -> None:
    config = make_config(tmp_path, {"kind": "assign"}, replicas=1, sharding="all")
    snapshot = carry_out(config, tmp_path / "run")
    with ExitStack() as files:
        [(batches, _)] = shard_data(snapshot, files)
        loop = Loop(config.experiment, snapshot.vocab_size, initial(snapshot), batches)
        expected = plain_training(loop, PHASES * INNER_STEPS)
        got = trained(snapshot)
        assert {name: tensor.numpy().tobytes() for name, tensor in expected.items()} == {
            name: tensor.tobytes() for name, tensor in got.items()
        }
        assert sum(metric["tokens"] for metric in snapshot.metrics if metric["kind"] == "TRAIN") == loop.tokens


@pytest.mark.parametrize("rescale", ["none", "sqrt"])
def test_one_module_a_level_is_diloco(tmp_path: Path, rescale: str) -> None:
    config = make_config(tmp_path, {"kind": "nesterov", "rescale": rescale}, replicas=3, sharding="random")
    snapshot = carry_out(config, tmp_path / "run")
    with ExitStack() as files:
        shards = shard_data(snapshot, files)
        base = Loop(config.experiment, snapshot.vocab_size, initial(snapshot), shards[0][0])
        expected = diloco(base, shards, config.experiment, PHASES, INNER_STEPS)
        for name, tensor in trained(snapshot).items():
            np.testing.assert_allclose(tensor, expected[name].numpy(), rtol=0, atol=1e-6, err_msg=name)


def test_a_path_composes_from_the_modules_of_its_levels(tmp_path: Path) -> None:
    config = make_config(tmp_path, {"kind": "assign"}, replicas=1, sharding="all")
    snapshot = carry_out(config, tmp_path / "run")
    paths = {module_id: path for module_id, (_, path) in snapshot.modules(MIXTURE).items()}
    plan: Plan = snapshot.plan
    composed = compose(config.experiment.model, snapshot.vocab_size, plan.mixture, paths)
    assert set(composed) == {spec.name for spec in plan.path_tensors(snapshot.state)}


def test_a_run_starts_from_a_hugging_face_checkpoint(tmp_path: Path) -> None:
    """The path of one run, exported, is the base of another: k-means needs no pretraining then."""
    from model.hugging_face import export_path

    first = carry_out(make_config(tmp_path, {"kind": "assign"}, replicas=1, sharding="all"), tmp_path / "run")
    export_path(tmp_path / "checkpoint", first.config.experiment.model, first.vocab_size, trained(first))
    document = make_config(tmp_path, {"kind": "nesterov"}, replicas=2, sharding="random").model_dump()
    document["experiment"]["sharding"]["kind"] = "kmeans"
    document["experiment"]["model"]["init_from"] = str(tmp_path / "checkpoint")
    second = carry_out(Config.model_validate(document), tmp_path / "second")
    base = {
        name: tensor for _, path in second.base_modules().values() for name, tensor in tensor_file.read(path).items()
    }
    for name, tensor in trained(first).items():
        np.testing.assert_array_equal(base[name], tensor, err_msg=name)
    assert any((tensor != base[name]).any() for name, tensor in trained(second).items())


def test_a_fixed_path_is_evaluated_without_any_other_model(tmp_path: Path) -> None:
    from dipaco.evaluation import evaluate_run

    snapshot = carry_out(make_config(tmp_path, {"kind": "nesterov"}, replicas=2, sharding="random"), tmp_path / "run")
    summary = evaluate_run(snapshot, routes=["path:0"], say=lambda line: None)
    assert summary["perplexity"]["dipaco"]["path:0"] > 1.0
    assert set() < set(summary["per_domain"]) <= {"recipe", "code", "law", "numbers"}
