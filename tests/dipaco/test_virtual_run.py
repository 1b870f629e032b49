"""Virtual simulations: costs from a run's own records, plans that cannot be played refused."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from configs.load import load_config
from configs.schema import Config
from coordinator.events import EventLog
from coordinator.journal import Journal
from coordinator.virtual import Costs
from dipaco.ending import Refused
from dipaco.faults import Fault, Poisson, coordinator_faults
from dipaco.simulating import FAULTS
from dipaco.virtual_run import measured_costs, simulate_virtually


@pytest.fixture
def config(tiny_config: Path) -> Config:
    return load_config(tiny_config)


def a_run(folder: Path, config: Config, seconds: list[float]) -> Path:
    """A run directory in which TRAIN tasks of 10 steps and a PACK task were completed."""
    journal = Journal(folder)
    journal.set_meta(config=config.model_dump_json())
    trained = [{"task_id": f"t{index}", "steps": 10, "seconds": each} for index, each in enumerate(seconds)]
    journal.commit([], [*trained, {"task_id": "pack", "steps": 0, "seconds": 3.0}])
    journal.close()
    return folder


def test_costs_are_medians_of_what_was_measured(config: Config, tmp_path: Path) -> None:
    run_dir = a_run(tmp_path, config, [10.0, 20.0, 90.0])
    log = EventLog(run_dir)
    log.write("leased", task_id="t0", fence=1, worker="w", kind="TRAIN")
    log.write("checkpoint", task_id="t0", fence=1, steps=4)
    log.write("completed", task_id="t0", fence=1, steps=10, seconds=0.0)
    log.write("joined", worker="worker-0", worker_id="w")
    log.close()
    started = {"wall_s": time.time() - 7.0, "at_s": 0.0, "process": "worker-0", "action": "start"}
    (run_dir / FAULTS).write_text(json.dumps(started) + "\n")
    costs = measured_costs(run_dir)
    assert costs.step_s == 2.0
    assert costs.other_task_s == 3.0
    assert 0.0 <= costs.overhead_s < 1.0
    assert 0.0 < costs.checkpoint_every_s < 1.0
    assert costs.start_s == pytest.approx(7.0, abs=1.0)


def test_a_run_without_training_has_no_costs(config: Config, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="trained nothing yet"):
        measured_costs(a_run(tmp_path, config, []))


def test_a_plan_is_played_to_the_end(config: Config) -> None:
    plan = Poisson(mtbf_s=100.0, restart_s=5.0).faults(4, seed=1)
    outcome = simulate_virtually(config, plan, Costs(step_s=2.0, overhead_s=1.0), seed=1)
    assert outcome["finished"]
    assert 0.0 < outcome["goodput"] <= 1.0


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        (coordinator_faults(30.0, 0), "no coordinator process to kill"),
        ([Fault(0.0, "worker-0", "start"), Fault(1.0, "worker-0", "stop")], "none that hang"),
    ],
)
def test_what_cannot_be_played_is_refused(config: Config, plan: list[Fault], sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        simulate_virtually(config, plan, Costs(step_s=1.0), seed=0)
