"""Who is asked, in which order, and how long a backend rests, without sockets or a clock."""

from __future__ import annotations

import numpy as np
import pytest

from inference.gateway_choice import LONGEST_REST_S, Choice, Failure, NoBackend, probe_verdict, verdict

POSTERIOR = np.array([0.1, 0.4, 0.4, 0.1])
GONE = Failure("unreachable", "cannot be reached")
WRONG = Failure("status", "answered 500", 500)
BUSY = Failure("status", "answered 429", 429, 30.0)


def test_paths_are_asked_by_posterior_ties_by_index() -> None:
    assert Choice([True] * 4, 5.0).order(POSTERIOR, 0.0) == [1, 2, 0, 3]
    assert Choice([True, False, True, True], 5.0).order(POSTERIOR, 0.0) == [2, 0, 3]


def test_a_backend_rests_longer_with_every_failure_until_it_answers() -> None:
    choice = Choice([True] * 4, 5.0)
    now_s = 100.0
    for rest_s in (5.0, 10.0, 20.0, 40.0, LONGEST_REST_S, LONGEST_REST_S):
        choice.failed(1, WRONG, now_s)
        assert choice.order(POSTERIOR, now_s + rest_s - 0.1) == [2, 0, 3]
        now_s += rest_s
        assert choice.order(POSTERIOR, now_s) == [1, 2, 0, 3]
    choice.answered(1)
    choice.failed(1, WRONG, now_s)
    assert choice.up(1, now_s + 5.0)


def test_one_that_could_not_be_reached_comes_back_with_a_probe_and_not_with_time() -> None:
    choice = Choice([True] * 4, 5.0)
    choice.failed(1, GONE, 0.0)
    choice.probed(1, GONE)
    assert not choice.up(1, 1e6)
    choice.probed(1, None)
    assert choice.up(1, 0.1)


def test_a_probe_does_not_end_the_rest_after_an_answer_that_failed() -> None:
    choice = Choice([True] * 4, 5.0)
    choice.failed(1, WRONG, 0.0)
    choice.probed(1, None)
    assert not choice.up(1, 4.9)
    assert choice.up(1, 5.0)


def test_where_none_is_up_all_are_tried_but_those_that_are_too_busy() -> None:
    choice = Choice([True] * 4, 5.0)
    for path_index, failure in enumerate((GONE, WRONG, BUSY, WRONG)):
        choice.failed(path_index, failure, 0.0)
    assert choice.order(POSTERIOR, 1.0) == [1, 0, 3]
    for path_index in (0, 1, 3):
        choice.failed(path_index, BUSY, 2.0)
    with pytest.raises(NoBackend) as refused:
        choice.order(POSTERIOR, 3.0)
    assert refused.value.retry_after_s == 27.0
    assert choice.order(POSTERIOR, 30.0) == [2]


@pytest.mark.parametrize(
    ("status", "fails"),
    [(200, False), (302, True), (400, False), (401, True), (404, True), (413, False), (422, False), (500, True)],
)
def test_what_a_status_says(status: int, fails: bool) -> None:
    assert (verdict(status) is not None) == fails


def test_a_busy_backend_says_itself_when_to_come_again() -> None:
    busy = verdict(429, "7")
    assert busy is not None
    assert (busy.busy, busy.retry_after_s) == (True, 7.0)
    other = verdict(503, "Wed, 21 Oct 2026 07:28:00 GMT")
    assert other is not None
    assert (other.busy, other.retry_after_s) == (False, None)


def test_a_server_without_a_list_of_models_is_up() -> None:
    assert [probe_verdict(status) is None for status in (200, 404, 429, 401, 403, 502)] == [True] * 3 + [False] * 3
