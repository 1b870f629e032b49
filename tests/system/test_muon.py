"""Muon through whole runs, from YAML and over gRPC: the same bits whoever leaves, and the weight of its inner state."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from configs.load import load_config, to_yaml
from configs.schema import Config
from coordinator.snapshot import RunSnapshot
from model import tensor_file
from model.inner_state import inner_state_tensors
from scripts.crash_points import small_config
from tests.small_run import SmallRun
from worker import leased_task
from worker.checkpoints import Checkpoints, Snapshot
from worker.outcome import HandedBack

# Pretraining, and two phases of two shards.
TRAIN_TASKS = 5


class LeavesAfterAStep(Checkpoints):
    """The first to take a task leaves after one step, and hands that over."""

    def offer(self, take: Callable[[], Snapshot], copy_bytes: int) -> None:
        if self.resume_path is None:
            self.hand_over(take, copy_bytes, sys.maxsize)
            raise HandedBack


def from_yaml(folder: Path, optimizer: str, inner_state: str) -> Config:
    """The small run with another inner optimizer, as a person would write it."""
    folder.mkdir()
    text = to_yaml(small_config(folder))
    for before, after in {" optimizer: adamw": optimizer, " inner_state: keep": inner_state}.items():
        assert text.count(before) == 1
        text = text.replace(before, f"{before.partition(':')[0]}: {after}")
    (folder / "run.yaml").write_text(text, encoding="utf-8")
    return load_config(folder / "run.yaml")


def undisturbed(folder: Path, config: Config) -> tuple[str, RunSnapshot]:
    """The digest of a run with one worker, and what it left."""
    run = SmallRun(folder, config)
    run.start()
    run.worker().run()
    return run.digest(), RunSnapshot.open(run.run_dir)


def left_in_every_task(folder: Path, config: Config) -> str:
    """The digest of the same run where every training task is begun by one worker and ended by another."""
    run = SmallRun(folder, config)
    run.start()
    said: list[str] = []
    with patch.object(leased_task, "Checkpoints", LeavesAfterAStep):
        for _ in range(TRAIN_TASKS + 1):
            run.worker(say=said.append).run()
    assert sum("goes on after step 1" in line for line in said) == TRAIN_TASKS
    return run.digest()


@pytest.mark.parametrize("inner_state", ["keep", "reset"])
def test_a_run_with_muon_has_the_same_bits_whoever_leaves(tmp_path: Path, inner_state: str) -> None:
    config = from_yaml(tmp_path / "runs", "muon", inner_state)
    digest, snapshot = undisturbed(tmp_path / "whole", config)
    assert left_in_every_task(tmp_path / "left", config) == digest
    specs = inner_state_tensors(config.experiment.inner, snapshot.plan.path_tensors(snapshot.state))
    for shard in snapshot.state.shards.values():
        if inner_state == "reset":
            assert shard.inner_state is None
            continue
        assert shard.inner_state is not None
        tensors = tensor_file.read(snapshot.store.path(shard.inner_state.digest), specs)
        assert all(np.any(values != 0) for values in tensors.values())


def test_the_inner_state_of_muon_is_lighter_on_the_wire_and_the_run_another(tmp_path: Path) -> None:
    runs = {
        name: undisturbed(tmp_path / name, from_yaml(tmp_path / f"{name}-yaml", name, "keep"))
        for name in ("adamw", "muon")
    }
    sent = {name: snapshot.state.standing.bytes_moved["inner_state"] for name, (_, snapshot) in runs.items()}
    matrices = 2 * (4 * 16 * 16 + 3 * 16 * 16)
    assert 0 < sent["muon"] < sent["adamw"] - TRAIN_TASKS * 4 * matrices
    assert runs["adamw"][0] != runs["muon"][0]
