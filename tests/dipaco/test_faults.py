from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dipaco.faults import (
    HANG_S,
    HORIZON_S,
    Fault,
    MalformedPlan,
    Poisson,
    Trace,
    coordinator_faults,
    kills,
    parse_plan,
    parse_trace,
    poisson,
    worker_name,
    write_plan,
)

SHARES = st.tuples(st.floats(0, 0.5), st.floats(0, 0.5))


def by_process(faults: list[Fault]) -> dict[str, list[Fault]]:
    found: dict[str, list[Fault]] = defaultdict(list)
    for fault in faults:
        found[fault.process].append(fault)
    return found


@given(st.floats(50, 5000), st.floats(0.1, 100), SHARES, st.integers(1, 4), st.integers(0, 99))
def test_every_worker_alternates_between_up_and_away(
    mtbf_s: float, restart_s: float, shares: tuple[float, float], num_workers: int, seed: int
) -> None:
    plan = Poisson(mtbf_s, restart_s, *shares).faults(num_workers, seed)
    assert [fault.at_s for fault in plan] == sorted(fault.at_s for fault in plan)
    assert set(by_process(plan)) == {worker_name(index) for index in range(num_workers)}
    for faults in by_process(plan).values():
        assert faults[0] == Fault(0.0, faults[0].process, "start")
        for away, back in zip(faults[1::2], faults[2::2], strict=False):
            assert (away.action == "stop") == (back.action == "continue")
            assert back.at_s - away.at_s == pytest.approx(HANG_S if away.action == "stop" else restart_s)
            assert away.action in ("kill", "terminate", "stop")
            assert back.action in ("start", "continue")


def test_a_plan_depends_on_the_seed_alone_and_a_worker_on_no_other() -> None:
    two, three = (Poisson(60, 10).faults(count, seed=7) for count in (2, 3))
    assert by_process(two)["worker-1"] == by_process(three)["worker-1"]
    assert two == Poisson(60, 10).faults(2, seed=7) != Poisson(60, 10).faults(2, seed=8)


def test_faults_are_as_frequent_as_was_asked() -> None:
    plan = Poisson(60, 10, stop=0.5).faults(4, seed=0)
    up_s = 60.0
    expected = 4 * HORIZON_S / (up_s + 0.5 * 10 + 0.5 * HANG_S)
    assert len(kills(plan, coordinator=False)) == pytest.approx(expected, rel=0.1)
    stops = sum(fault.action == "stop" for fault in plan)
    assert stops == pytest.approx(expected / 2, rel=0.2)
    deaths = coordinator_faults(30, seed=0)
    assert len(kills(deaths, coordinator=True)) == pytest.approx(HORIZON_S / 31, rel=0.1)
    assert not kills(deaths, coordinator=False)


STEPS = st.lists(st.tuples(st.integers(0, 500), st.integers(0, 9)), min_size=1, max_size=30).map(
    lambda steps: tuple(sorted((float(at_s), alive) for at_s, alive in steps))
)


@given(STEPS, st.integers(1, 6), st.sampled_from([1.0, 4.0]), st.sampled_from([1.0, 0.5]), st.integers(0, 9))
def test_as_many_workers_live_as_the_trace_says(
    steps: tuple[tuple[float, int], ...], num_workers: int, speedup: float, scale: float, seed: int
) -> None:
    trace = Trace(steps, speedup, scale)
    if not any(alive * scale >= 0.5 for alive in dict(steps).values()):
        with pytest.raises(MalformedPlan):
            trace.faults(num_workers, seed)
        return
    plan, alive = trace.faults(num_workers, seed), set[str]()
    assert plan[0].at_s == 0.0
    for at_s, wanted in trace.levels(num_workers):
        for fault in (each for each in plan if each.at_s == at_s):
            assert (fault.process in alive) == (fault.action == "kill")
            alive ^= {fault.process}
        assert len(alive) == wanted <= num_workers
    assert len(alive) == num_workers


def test_leading_zeroes_are_cut_and_the_last_row_of_a_moment_counts() -> None:
    trace = parse_trace("0,0\n100,0\n100,2\n100,4\n160,1\n", speedup=60)
    assert trace.levels(3) == [(0.0, 3), (1.0, 1), (2.0, 3)]


@pytest.mark.parametrize("text", ["1;2", "5,1\n3,1", "0,-1", "x,1", "0,1.5", "nan,1"])
def test_what_is_no_trace_is_refused(text: str) -> None:
    with pytest.raises(MalformedPlan, match=r"line \d of the trace"):
        parse_trace(text)


def test_a_plan_is_replayed_as_it_was_written() -> None:
    plan = sorted(Poisson(60, 10, 0.3, 0.3).faults(3, seed=1) + coordinator_faults(30, seed=1))
    assert parse_plan(write_plan(plan), 3) == plan


@pytest.mark.parametrize(
    "line",
    [
        "no json",
        '{"at_s": 1.0, "process": "worker-0"}',
        '{"at_s": 1.0, "process": "worker-0", "action": "burn"}',
        '{"at_s": -1.0, "process": "worker-0", "action": "kill"}',
        '{"at_s": "now", "process": "worker-0", "action": "kill"}',
        '{"at_s": 1.0, "process": "worker-7", "action": "kill"}',
        "[1]",
    ],
)
def test_what_is_no_plan_is_refused(line: str) -> None:
    with pytest.raises(MalformedPlan, match="line 1 of the plan"):
        parse_plan(line, 2)


@pytest.mark.parametrize(
    "text", ["mtbf=60", "restart=1", "mtbf=0,restart=1", "mtbf=a,restart=1", "mtbf=1,restart=1,x=1"]
)
def test_a_specification_that_is_not_clear_is_refused(text: str) -> None:
    with pytest.raises(MalformedPlan, match="--preempt"):
        poisson(text)


def test_shares_add_up_to_one_at_most() -> None:
    with pytest.raises(MalformedPlan, match="shares"):
        poisson("mtbf=1,restart=1,stop=0.6,term=0.6")
    assert poisson("mtbf=60,restart=10,stop=0.25") == Poisson(60, 10, stop=0.25)
