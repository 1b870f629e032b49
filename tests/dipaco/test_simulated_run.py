from __future__ import annotations

from pathlib import Path

import pytest

from dipaco.faults import COORDINATOR, Fault, MalformedPlan, Poisson, write_plan
from dipaco.simulated_run import Wish, fault_plan


def wish(preempt: str, coordinator_mtbf_s: float | None = None) -> Wish:
    return Wish(2, preempt, coordinator_mtbf_s, 3, compare=False, min_worker_kills=0, min_coordinator_kills=0)


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
