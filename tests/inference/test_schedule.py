"""Who is run next, without tensors or threads."""

from __future__ import annotations

from typing import Any

import pytest

from inference.engine import Request
from inference.schedule import BatchLimits, Full, Schedule
from inference.slot_attention import reads_padded
from inference.stream import Reading, Served, Stream
from routing.router import OnePath
from tests.inference.conftest import Mixture

READING = Reading(8, 0, 3)


def stream(mixture: Mixture, path: int = 0, prompt_tokens: int = 3) -> Stream:
    found = Stream(Request([5] * prompt_tokens, 4, path=path), Served(mixture.source(), OnePath()), READING)
    found.route()
    return found


def placed(mixture: Mixture, schedule: Schedule, *paths: int) -> list[Stream]:
    """Texts with a slot whose context is read."""
    streams = [stream(mixture, path) for path in paths]
    for each in streams:
        schedule.add(each)
    schedule.join()
    for each in streams:
        each.ran(len(each.context))
    return streams


def test_slots_go_to_those_that_wait_longest(mixture: Mixture) -> None:
    schedule = Schedule(BatchLimits(running=2, waiting=1))
    streams = [stream(mixture) for _ in range(4)]
    for each in streams[:3]:
        schedule.add(each)
    with pytest.raises(Full):
        schedule.add(streams[3])
    assert schedule.join() == streams[:2]
    assert [each.slot for each in streams[:2]] == [0, 1]
    schedule.leave(streams[0])
    schedule.leave(streams[0])
    assert schedule.join() == [streams[2]]
    assert streams[2].slot == 0
    for each in streams:
        schedule.leave(each)
    assert schedule.idle


def test_a_long_prompt_is_read_in_pieces_and_lets_others_pass(mixture: Mixture) -> None:
    schedule = Schedule(BatchLimits(chunk_tokens=16))
    long, short = stream(mixture, prompt_tokens=39), stream(mixture, prompt_tokens=3)
    for each in (long, short):
        schedule.add(each)
    for each in schedule.join():
        schedule.read(each)
    read = []
    while piece := schedule.next_piece():
        read.append(piece)
        piece[0].ran(piece[1])
    assert read == [(long, 16), (short, 4), (long, 32), (long, 40)]
    assert schedule.turn(lambda each: dict.fromkeys(each.digests, 1), 0) == [long]  # nothing fits: one at a time


def test_who_fits_in_memory_has_a_turn_then_the_others(mixture: Mixture) -> None:
    schedule = Schedule(BatchLimits(turn_steps=3))
    zero, one, two, three = placed(mixture, schedule, 0, 1, 2, 3)

    def module_bytes(each: Stream) -> dict[str, int]:
        return dict.fromkeys(each.digests, 10)

    assert schedule.turn(module_bytes, 40) == [zero, one, two, three]
    turns = [schedule.turn(module_bytes, 30) for _ in range(9)]
    assert turns[:3] == [[zero, one]] * 3  # they share a module: three in all
    assert turns[3:6] == [[two, three]] * 3
    assert turns[6:] == [[zero, one]] * 3
    assert schedule.turn(module_bytes, 5) == [two]  # more than memory holds, one at a time


def test_padding_is_read_where_texts_are_alike() -> None:
    assert reads_padded(range(16), [500] * 16)
    assert not reads_padded(range(16), [1000] + [10] * 15)
    assert not reads_padded([0, 15], [900, 900])


@pytest.mark.parametrize("changes", [{"running": 0}, {"chunk_tokens": 0}, {"turn_steps": 0}, {"waiting": -1}])
def test_limits_that_are_none_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected at least"):
        BatchLimits(**changes)
