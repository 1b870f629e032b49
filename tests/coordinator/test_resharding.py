"""A run that gives its sequences new shards half-way: what changes with them, what goes on, and what a crash may do."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.schema import Config
from coordinator.snapshot import RunSnapshot
from coordinator.virtual import Costs, VirtualRun
from protocol.tasks import EvaluateSpec, TrainSpec
from routing.frozen import read_router
from routing.gater import Gater
from routing.records import ShardManifest
from tests.played_run import Played, config_of, digest, played

RESHARD_KINDS = ["FEATURIZE", "SCORE", "FEATURIZE", "PACK"]


def play(folder: Path, script: Callable[[Played], Awaitable[None]]) -> Path:
    """Open the run in `folder` (again), let the script call it, close it; returns its directory."""

    async def opened() -> None:
        async with played(config_of(folder, reshard=True), folder / "run") as run:
            await script(run)

    asyncio.run(opened())
    return folder / "run"


@pytest.fixture(scope="module")
def resharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return play(tmp_path_factory.mktemp("resharded"), Played.finish)


def manifests(snapshot: RunSnapshot) -> list[ShardManifest]:
    refs = [shard.manifest for shard in snapshot.state.shards_of("mixture")]
    return [ShardManifest.from_bytes(snapshot.store.path(ref.digest).read_bytes()) for ref in refs if ref]


def test_shards_and_router_are_of_one_version(resharded: Path) -> None:
    snapshot = RunSnapshot.open(resharded)
    assert snapshot.router_path is not None
    router = read_router(snapshot.router_path.read_bytes())
    assert isinstance(router, Gater)
    assert {manifest.router for manifest in manifests(snapshot)} == {snapshot.router_path.name} == {router.version}
    held = np.sort(np.concatenate([manifest.ids for manifest in manifests(snapshot)]))
    assert len(np.unique(held)) == len(held), "every training sequence is in one shard"
    assert all(len(manifest.ids) for manifest in manifests(snapshot))
    first = snapshot.state.stages["shard"].result["shards"]
    assert len(held) == sum(entry["sequences"] for entry in first)
    assert snapshot.state.stages["reshard"].result["router"] != snapshot.state.stages["shard"].result["router"]


def test_modules_and_inner_state_go_on_over_a_reshard(resharded: Path) -> None:
    snapshot = RunSnapshot.open(resharded)
    assert [module.version for module in snapshot.state.modules_of("mixture")] == [2, 2, 2]
    for shard in snapshot.state.shards_of("mixture"):
        assert (shard.phase, shard.adam_step, shard.steps_done) == (2, 6, 2), "the data cursor alone starts over"
    trained = [metric for metric in snapshot.metrics if metric["kind"] == "TRAIN" and metric["model"] == "mixture"]
    assert [(m["stage"], m["phase"], m["first_step"]) for m in trained] == [
        *[("train", 0, 2)] * 2,
        *[("train-2", 1, 4)] * 2,
    ]


def test_what_was_scored_is_reported(resharded: Path) -> None:
    found = RunSnapshot.open(resharded).state.stages["reshard"].result["gater"]
    assert sum(found["label_shares"]) == pytest.approx(1.0)
    assert min(found["label_shares"]) > 0.0
    assert 0.0 <= found["agreement"] <= 1.0
    assert found["best_loss"] <= found["label_loss"]
    assert found["best_loss"] <= found["former_loss"], "no router beats the best path of every sequence"


def test_nothing_that_nobody_names_is_left(resharded: Path) -> None:
    snapshot = RunSnapshot.open(resharded)
    held = {path.name for path in (resharded / "blobs").iterdir() if len(path.name) == 64}
    assert held == set(snapshot.blobs())


def test_a_restart_at_any_task_of_the_stage_changes_nothing(resharded: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, Any]] = []

    async def one_task(run: Played) -> None:
        lease = await run.lease()
        if not lease.finished:
            seen.append((lease.task_id, lease.spec))
            await run.task(lease)

    while True:
        run_dir = play(tmp_path, one_task)
        if RunSnapshot.open(run_dir).state.standing.finished:
            break
    assert digest(run_dir) == digest(resharded)
    kinds = [task_id.split("/")[1] for task_id, _ in seen if task_id.startswith("reshard/")]
    assert list(dict.fromkeys(zip(kinds, kinds, strict=True))) == [(k, k) for k in dict.fromkeys(RESHARD_KINDS)]
    scored = [spec for task_id, spec in seen if "/SCORE/" in task_id]
    assert all(isinstance(spec, EvaluateSpec) and spec.path.model == "mixture" for spec in scored)
    assert {module.version for spec in scored for module in spec.path.modules} == {1}
    orders = [spec.order_seed for _, spec in seen if isinstance(spec, TrainSpec) and spec.path.model == "mixture"]
    assert len(set(orders)) == 4, "shards are read in an order of their own after a re-shard"


def stages_of(*kinds: str) -> list[dict[str, Any]]:
    more = {"train": {"phases": 2, "inner_steps": 20}, "pretrain": {"steps": 2, "inner_steps": 2}}
    return [{"kind": kind, **more.get(kind, {})} for kind in kinds]


def virtual_config(*kinds: str, **sharding: Any) -> Config:
    levels = [{"modules": 2, "blocks": [0], "embedding": True}, {"modules": 2, "blocks": [1], "head": True}]
    experiment: dict[str, Any] = {
        "model": {"blocks": 2, "hidden_size": 8, "heads": 2, "intermediate_size": 16, "sequence_length": 64},
        "topology": {"levels": levels},
        "sharding": {"kind": "kmeans", **sharding},
        "stages": stages_of(*kinds),
    }
    return Config.model_validate({"name": "virtual", "experiment": experiment})


def test_any_number_of_reshards_is_carried_out_in_turn() -> None:
    config = virtual_config("pretrain", "shard", "train", "reshard", "train", "reshard", "train")
    costs = Costs(step_s=1.0, other_task_s=5.0, overhead_s=2.0, outer_step_s=1.0, start_s=0.0)
    run = VirtualRun(config, costs, [(0.0, f"worker-{index}", "start") for index in range(4)])
    outcome = run.run()
    assert outcome.finished
    assert outcome.steps_in_weights == 2 + 4 * 6 * 20
    stages = run.machine.state.stages
    assert [name for name in stages if name.startswith(("train", "reshard"))] == [
        "train",
        "reshard",
        "train-2",
        "reshard-2",
        "train-3",
    ]
    assert stages["train-2"].started_s >= stages["reshard"].finished_s > stages["train"].finished_s
    assert all(module.version == 6 for module in run.machine.state.modules_of("mixture"))


def test_too_few_sequences_to_fit_a_gater_to_are_told_before_anything_is_trained(tmp_path: Path) -> None:
    config = config_of(tmp_path, reshard=True)
    splits = config.experiment.corpus.splits.model_copy(update={"router": 0.02})
    corpus = config.experiment.corpus.model_copy(update={"splits": splits})
    config = config.model_copy(update={"experiment": config.experiment.model_copy(update={"corpus": corpus})})

    async def until_paused() -> str:
        async with played(config, tmp_path / "run") as run:
            while not (paused := run.coordinator._machine.state.standing.paused):
                lease = await run.lease(wait_s=0.1)
                if lease.spec is not None:
                    await run.task(lease)
            assert "pretrain" not in [metric["stage"] for metric in RunSnapshot.open(run.run_dir).metrics]
            return paused

    paused = asyncio.run(until_paused())
    assert "the split 'router' has" in paused
    assert "raise corpus.splits.router" in paused


def test_a_gater_that_starves_a_shard_does_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Argmax of a gater that knows one path alone: the shards get as many sequences as one another instead."""
    paths = Gater.distances

    def one_path_alone(gater: Gater, z: Any) -> Any:
        distances = paths(gater, z)
        distances[:, 0] = 0.0
        return distances

    monkeypatch.setattr(Gater, "distances", one_path_alone)
    said: list[str] = []

    async def script(run: Played) -> None:
        await run.finish()
        said.extend(run.said)

    snapshot = RunSnapshot.open(play(tmp_path, script))
    sizes = [len(manifest.ids) for manifest in manifests(snapshot)]
    assert max(sizes) - min(sizes) <= 1
    assert any("as many sequences as one another" in line for line in said)
