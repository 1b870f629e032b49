"""Virtual runs: undisturbed ones take what their costs add up to, disturbed ones lose what was in flight, no more."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from configs.schema import Config
from coordinator.virtual import Costs, VirtualRun

COSTS = Costs(step_s=1.0, other_task_s=5.0, overhead_s=2.0, outer_step_s=1.0, start_s=0.0)


def make_config(grid: int, phases: int) -> Config:
    experiment: dict[str, Any] = {
        "model": {"blocks": 2, "hidden_size": 8, "heads": 2, "intermediate_size": 16, "sequence_length": 64},
        "topology": {
            "levels": [
                {"modules": grid, "blocks": [0], "embedding": True},
                {"modules": grid, "blocks": [1], "head": True},
            ]
        },
        "sharding": {"kind": "random"},
        "stages": [{"kind": "shard"}, {"kind": "train", "phases": phases, "inner_steps": 20}],
    }
    return Config.model_validate({"name": "virtual", "experiment": experiment})


def starts(count: int) -> list[tuple[float, str, str]]:
    return [(0.0, f"worker-{index}", "start") for index in range(count)]


def test_an_undisturbed_run_takes_what_its_costs_add_up_to() -> None:
    outcome = VirtualRun(make_config(2, 3), COSTS, starts(4)).run()
    assert outcome.finished
    assert outcome.steps_in_weights == outcome.steps_executed == 4 * 3 * 20
    assert outcome.wall_s == pytest.approx(2 * (5 + 2) + 3 * (20 + 2 + 1))


def test_fewer_workers_take_several_waves() -> None:
    alone = VirtualRun(make_config(2, 3), COSTS, starts(1)).run()
    four = VirtualRun(make_config(2, 3), COSTS, starts(4)).run()
    assert alone.wall_s > 3.5 * four.wall_s
    assert alone.steps_in_weights == four.steps_in_weights


def test_a_kill_loses_the_steps_in_flight_and_another_worker_takes_over() -> None:
    faults = [*starts(5), (14.0 + 12.0, "worker-1", "kill")]
    outcome = VirtualRun(make_config(2, 3), COSTS, faults).run()
    assert outcome.finished
    assert outcome.kills == 1
    assert outcome.steps_in_weights == 4 * 3 * 20
    assert 0 < outcome.steps_executed - outcome.steps_in_weights <= 20
    assert len(outcome.recovery_s) == 1
    assert outcome.recovery_s[0] <= 4.0


def test_all_workers_may_die_and_come_back() -> None:
    deaths = [(30.0, f"worker-{index}", "kill") for index in range(4)]
    faults = [*starts(4), *deaths, *((60.0, name, "start") for _, name, _ in deaths)]
    outcome = VirtualRun(make_config(2, 2), COSTS, faults).run()
    assert outcome.finished
    assert outcome.steps_in_weights == 4 * 2 * 20
    assert outcome.to_dict()["goodput"] < 1.0


def test_checkpoints_keep_what_was_done_before_a_kill() -> None:
    """Tasks of 20 s, and one of four workers dies every 5 s."""
    faults = starts(4)
    for index in range(400):
        name, at_s = f"worker-{index % 4}", 20.0 + 5.0 * index
        faults += [(at_s, name, "kill"), (at_s + 1.0, name, "start")]
    without = VirtualRun(make_config(2, 3), COSTS, faults).run()
    often = VirtualRun(make_config(2, 3), replace(COSTS, checkpoint_every_s=2.0), faults).run()
    assert often.finished
    assert often.steps_in_weights == 4 * 3 * 20
    assert often.to_dict()["goodput"] > 0.85
    assert often.to_dict()["goodput"] > without.to_dict()["goodput"]
    assert often.wall_s < without.wall_s


def test_audits_cost_a_second_copy_of_every_audited_task_and_count_it_once() -> None:
    config = make_config(2, 3)
    audited = config.model_copy(update={"execution": config.execution.model_copy(update={"audit_share": 1.0})})
    outcome = VirtualRun(audited, COSTS, starts(4)).run()
    assert outcome.finished
    assert outcome.steps_in_weights == 4 * 3 * 20
    assert outcome.steps_executed == 2 * 4 * 3 * 20


def test_audits_and_kills_together_neither_hang_nor_count_twice() -> None:
    config = make_config(2, 4)
    audited = config.model_copy(update={"execution": config.execution.model_copy(update={"audit_share": 0.5})})
    deaths = [(20.0 + 17.0 * turn, f"worker-{turn % 3}", "kill") for turn in range(12)]
    faults = sorted([*starts(4), *deaths, *((at_s + 8.0, name, "start") for at_s, name, _ in deaths)])
    outcome = VirtualRun(audited, COSTS, faults).run()
    assert outcome.finished
    assert outcome.steps_in_weights == 4 * 4 * 20


def test_a_worker_killed_before_it_asked_for_anything_never_does() -> None:
    slow_start = replace(COSTS, start_s=10.0)
    killed = [*starts(4), (5.0, "worker-3", "kill")]
    outcome = VirtualRun(make_config(2, 3), slow_start, killed).run()
    assert outcome.kills == 1
    assert outcome.wall_s == VirtualRun(make_config(2, 3), slow_start, starts(3)).run().wall_s
    again = [*killed, (6.0, "worker-3", "start")]
    assert VirtualRun(make_config(2, 3), slow_start, again).run().wall_s < outcome.wall_s


def test_the_coordinators_own_tasks_take_their_time() -> None:
    plain = VirtualRun(make_config(2, 3), COSTS, starts(4)).run()
    working = VirtualRun(make_config(2, 3), replace(COSTS, local_s={"corpus": 4.0, "shard": 3.0}), starts(4)).run()
    assert working.wall_s == pytest.approx(plain.wall_s + 7.0)
