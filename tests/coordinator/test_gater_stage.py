"""A gater that is fitted after the last training: another router, the same shards, and the same bits over a restart."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from configs.schema import Config
from coordinator.snapshot import RunSnapshot
from dipaco.report import sharding_of
from dipaco.run_router import open_router
from routing.clusters import Clusters
from routing.frozen import read_router
from routing.gater import Gater
from tests.played_run import Played, config_of, digest, played


def gated(folder: Path, *, gater: bool = True) -> Config:
    """The small run with two phases in one stage, and a gater after them or not."""
    document = config_of(folder, reshard=True).model_dump(mode="json")
    stages = document["experiment"]["stages"]
    trained = next(stage for stage in stages if stage["kind"] == "train")
    kept = [stage for stage in stages if stage["kind"] not in ("train", "reshard")]
    document["experiment"]["stages"] = [*kept, {**trained, "phases": 2}, *([{"kind": "gater"}] if gater else [])]
    return Config.model_validate(document)


def play(config: Config, run_dir: Path, script: Callable[[Played], Awaitable[Any]]) -> RunSnapshot:
    async def opened() -> None:
        async with played(config, run_dir) as run:
            await script(run)

    asyncio.run(opened())
    return RunSnapshot.open(run_dir)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gated")
    play(gated(folder), folder / "run", Played.finish)
    return folder


def test_inference_is_routed_by_the_gater_and_the_shards_are_as_before(finished: Path, tmp_path: Path) -> None:
    snapshot = RunSnapshot.open(finished / "run")
    plain = play(gated(finished, gater=False), tmp_path / "plain", Played.finish)
    assert snapshot.router_path is not None
    assert plain.router_path is not None
    assert isinstance(read_router(snapshot.router_path.read_bytes()), Gater)
    assert isinstance(read_router(plain.router_path.read_bytes()), Clusters)
    assert isinstance(open_router(snapshot).frozen, Gater)
    for found, wanted in zip(snapshot.state.shards_of("mixture"), plain.state.shards_of("mixture"), strict=True):
        assert (found.manifest, found.files, found.steps_done) == (wanted.manifest, wanted.files, wanted.steps_done)
    assert [row.params for row in snapshot.state.modules_of("mixture")] == [
        row.params for row in plain.state.modules_of("mixture")
    ]


def test_what_it_found_is_reported(finished: Path) -> None:
    found = sharding_of(RunSnapshot.open(finished / "run"))
    assert list(found) == ["shard", "gater"]
    assert found["gater"]["best_loss"] <= found["gater"]["gater_loss"]
    assert "token_shares" not in found["gater"]


def test_a_restart_at_any_task_changes_nothing(finished: Path, tmp_path: Path) -> None:
    seen: list[str] = []

    async def one_task(run: Played) -> None:
        lease = await run.lease()
        if not lease.finished:
            seen.append(lease.task_id)
            await run.task(lease)

    while not play(gated(finished), tmp_path / "run", one_task).state.standing.finished:
        pass
    assert digest(tmp_path / "run") == digest(finished / "run")
    kinds = dict.fromkeys(task_id.split("/")[1] for task_id in seen if task_id.startswith("gater/"))
    assert list(kinds) == ["FEATURIZE", "SCORE"]
    assert not any(task_id.startswith("gater/") and "assign" in task_id for task_id in seen), "no sequence moves"


@pytest.mark.parametrize("kinds", [("shard", "gater"), ("shard", "train", "gater", "train"), ("gater",)])
def test_a_gater_stands_after_the_last_train(kinds: tuple[str, ...], tmp_path: Path) -> None:
    document = gated(tmp_path).model_dump(mode="json")
    stages = {stage["kind"]: stage for stage in document["experiment"]["stages"]}
    document["experiment"]["stages"] = [stages["pretrain"], *(stages[kind] for kind in kinds)]
    with pytest.raises(ValidationError, match="after the last train one gater"):
        Config.model_validate(document)
