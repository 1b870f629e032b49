from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dipaco.faults import HORIZON_S, Fault, MalformedPlan, parse_plan, write_plan
from dipaco.network import (
    PACKET_BYTES,
    RETRANSMISSION_S,
    Conditions,
    Line,
    MalformedNetwork,
    Network,
    parse_network,
    split_plan,
)

WHOLE = "latency=200ms,jitter=0.05,rate=10Mbit,loss=5%,drop_mtbf=30,partition_mtbf=120,partition=60s"


def test_every_option_is_read_in_its_units() -> None:
    assert parse_network(WHOLE) == Network(0.2, 0.05, 10e6, 0.05, 30.0, 120.0, 60.0)
    assert parse_network("rate=500kbit") == Network(rate_bits_per_s=500e3)
    assert parse_network("latency=0,loss=0.5") == Network(loss=0.5)


@given(
    st.builds(
        Network,
        st.sampled_from([0.1, 0.25]),
        st.sampled_from([0.0, 0.05]),
        st.sampled_from([None, 1e6, 12.5e6]),
        st.sampled_from([0.0, 0.03]),
        st.sampled_from([None, 7.5]),
        st.sampled_from([None, 100.0]),
    )
)
def test_a_network_is_read_as_it_was_written(network: Network) -> None:
    assert parse_network(network.spec) == network


@pytest.mark.parametrize(
    "text",
    [
        "",
        "bad",
        "latency",
        "latency=",
        "latency=-1",
        "latency=1h",
        "latency=nan",
        "latency=inf",
        "rate=0",
        "rate=10MB",
        "loss=1",
        "loss=100%",
        "loss=1.2.3",
        "drop_mtbf=0",
        "partition_mtbf=0",
        "partition=60",
        "latency=0.1,jitter=0.2",
        "latency=0.1,delay=2",
    ],
)
def test_what_is_no_network_is_refused_in_a_sentence(text: str) -> None:
    with pytest.raises(MalformedNetwork, match="--network"):
        parse_network(text)


def test_faults_are_as_frequent_as_was_asked_and_depend_on_the_seed_alone() -> None:
    network = parse_network(WHOLE)
    found = network.faults(2, seed=4)
    counts = Counter(fault.action for fault in found)
    assert counts["drop"] == pytest.approx(2 * HORIZON_S / 30, rel=0.1)
    assert counts["part"] == counts["heal"] == pytest.approx(2 * HORIZON_S / 180, rel=0.2)
    assert found == network.faults(2, seed=4) != network.faults(2, seed=5)
    assert [fault for fault in network.faults(3, 4) if fault.process != "worker-2"] == found
    of_one = [fault for fault in found if fault.process == "worker-1" and fault.action != "drop"]
    for begin, end in zip(of_one[::2], of_one[1::2], strict=True):
        assert (begin.action, end.action) == ("part", "heal")
        assert end.at_s - begin.at_s == pytest.approx(60.0)


def test_a_plan_keeps_its_network() -> None:
    conditions, faults = Conditions(parse_network(WHOLE), 7), [Fault(1.0, "worker-0", "drop")]
    found, rest = split_plan(conditions.line() + write_plan(faults))
    assert found == conditions
    assert parse_plan(rest, 1) == faults
    assert split_plan(write_plan(faults)) == (None, write_plan(faults))
    assert split_plan('{"network": "", "seed": 1}\n') == (Conditions(Network(), 1), "")


@pytest.mark.parametrize(
    "line", ['{"network": "much"}', '{"network": "much", "seed": 1}', '{"network": "", "seed": []}']
)
def test_a_first_line_that_is_not_clear_is_refused(line: str) -> None:
    with pytest.raises(MalformedPlan, match="line 1 of the plan"):
        split_plan(line + "\n")


class Chances(random.Random):
    """A source that says what it was told to."""

    def __init__(self, *values: float) -> None:
        super().__init__(0)
        self._values = list(values)

    def random(self) -> float:
        return self._values.pop(0)


def test_a_line_sends_one_piece_after_the_other_and_then_the_latency_passes() -> None:
    line = Line(Network(latency_s=0.5, rate_bits_per_s=8000), Chances())
    assert line.arrival_s(1000, now_s=10.0) == 11.5
    assert line.arrival_s(500, now_s=10.1) == 12.0
    assert line.arrival_s(1000, now_s=20.0) == 21.5


def test_jitter_never_reorders_a_stream() -> None:
    line, after_s = Line(Network(latency_s=0.3, jitter_s=0.3), random.Random(1)), 0.0
    arrivals = []
    for step in range(200):
        after_s = line.arrival_s(100, step * 0.01, after_s)
        arrivals.append(after_s - step * 0.01)
    assert min(arrivals) >= 0
    assert 0.3 < max(arrivals) <= 0.6


def test_a_loss_costs_a_time_out_and_a_round_trip_and_twice_that_where_it_is_lost_again() -> None:
    network = Network(latency_s=0.1, loss=0.2)
    once, twice = RETRANSMISSION_S + 0.2, 3 * (RETRANSMISSION_S + 0.2)
    line = Line(network, Chances(0.19, 0.5, 0.19, 0.1, 0.5, 0.21))
    assert line.arrival_s(PACKET_BYTES, 0.0) == pytest.approx(0.1 + once)
    assert line.arrival_s(PACKET_BYTES, 0.0) == pytest.approx(0.1 + twice)
    assert line.arrival_s(PACKET_BYTES, 0.0) == pytest.approx(0.1)
    assert (line.stalls, line.stalled_bytes) == (2, 2 * PACKET_BYTES)


def test_as_many_pieces_are_held_up_as_packets_are_lost() -> None:
    line = Line(Network(loss=0.01), random.Random(3))
    for _ in range(4000):
        line.arrival_s(10 * PACKET_BYTES, 0.0)
    assert line.stalls / 4000 == pytest.approx(1 - 0.99**10, rel=0.1)
