from __future__ import annotations

from pathlib import Path

import pytest

from dipaco.faults import COORDINATOR, Fault, MalformedPlan, Poisson, write_plan
from dipaco.network import Conditions, MalformedNetwork, Network
from dipaco.simulated_run import Wish, conditions_of, fault_plan, of_processes


def wish(preempt: str, coordinator_mtbf_s: float | None = None, network: str | None = None) -> Wish:
    return Wish(2, preempt, coordinator_mtbf_s, 3, False, 0, 0, network)


def test_every_kind_of_plan_is_read(tmp_path: Path) -> None:
    trace, plan = tmp_path / "trace.csv", tmp_path / "plan.jsonl"
    trace.write_text("0,0\n50,8\n650,4\n", encoding="utf-8")
    plan.write_text(write_plan([Fault(1.0, "worker-1", "start")]), encoding="utf-8")
    assert fault_plan(wish("poisson:mtbf=60,restart=10")) == Poisson(60, 10).faults(2, 3)
    assert fault_plan(wish(f"plan:{plan}")) == [Fault(1.0, "worker-1", "start")]
    followed = fault_plan(wish(f"trace:{trace},speedup=600,scale=0.25"))
    assert [(fault.at_s, fault.action) for fault in followed] == [
        (0.0, "start"),
        (0.0, "start"),
        (1.0, "kill"),
        (2.0, "start"),
    ]


def test_the_coordinators_faults_are_woven_in() -> None:
    quiet, loud = (fault_plan(wish("poisson:mtbf=60,restart=10", mtbf_s)) for mtbf_s in (None, 30.0))
    assert [fault for fault in loud if fault.process != COORDINATOR] == quiet
    assert any(fault.process == COORDINATOR for fault in loud[:20])
    assert [fault.at_s for fault in loud] == sorted(fault.at_s for fault in loud)


@pytest.mark.parametrize("preempt", ["often", "poisson", "trace:nowhere", "plan:nowhere", "trace:nowhere,fast=1"])
def test_what_is_no_specification_is_refused_in_a_sentence(preempt: str) -> None:
    with pytest.raises(MalformedPlan, match="--preempt"):
        fault_plan(wish(preempt))


def test_the_networks_faults_are_woven_in_and_a_plan_of_them_is_replayed(tmp_path: Path) -> None:
    asked = wish("poisson:mtbf=600,restart=10", network="latency=0.1,drop_mtbf=50,partition_mtbf=300,partition=5")
    found = fault_plan(asked)
    conditions = conditions_of(asked, found)
    assert conditions == Conditions(Network(0.1, drop_mtbf_s=50.0, partition_mtbf_s=300.0, partition_s=5.0), 3)
    assert {fault.action for fault in found} == {"start", "kill", "drop", "part", "heal"}
    plan = tmp_path / "plan.jsonl"
    plan.write_text(conditions.line() + write_plan(found), encoding="utf-8")
    again = wish(f"plan:{plan}")
    assert fault_plan(again) == found
    assert conditions_of(again, found) == conditions
    with pytest.raises(MalformedNetwork, match="a network of its own"):
        conditions_of(wish(f"plan:{plan}", network="latency=1"), found)


def test_a_plan_that_disturbs_links_has_a_perfect_network_otherwise(tmp_path: Path) -> None:
    plan = tmp_path / "plan.jsonl"
    plan.write_text(write_plan([Fault(1.0, "worker-1", "drop")]), encoding="utf-8")
    asked = wish(f"plan:{plan}")
    assert conditions_of(asked, fault_plan(asked)) == Conditions(Network(), 3)
    assert conditions_of(wish("poisson:mtbf=60,restart=10"), []) is None
    with pytest.raises(MalformedNetwork, match="--network"):
        fault_plan(wish("poisson:mtbf=60,restart=10", network="fast"))


def test_what_was_done_to_links_is_not_done_to_processes() -> None:
    facts = [{"process": "worker-0", "action": action} for action in ("start", "part", "drop", "heal", "kill")]
    assert [fact["action"] for fact in of_processes(facts)] == ["start", "kill"]
