"""The norm check: what an honest run may do without a doubt, and what it may not."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.norms import MIN_NORMS, WINDOW, Norms

FACTOR = 10.0


def after(history: list[float]) -> Norms:
    norms = Norms(FACTOR)
    for norm in history:
        norms.learn("mixture", {"0.1": norm})
    return norms


@pytest.mark.parametrize("norm", [0.0, 1e-40, 0.09, 10.2, 1e6])
def test_far_above_and_far_below_are_doubted_and_so_is_a_free_rider(norm: float) -> None:
    doubt = after([1.0] * MIN_NORMS).doubt("mixture", {"0.1": norm})
    assert "module 0.1" in doubt
    assert f"{norm:.3g}" in doubt
    assert "recent ones 1" in doubt


@pytest.mark.parametrize("norm", [0.11, 0.5, 2.0, 9.8])
def test_what_lies_within_the_factor_is_believed(norm: float) -> None:
    assert not after([1.0] * MIN_NORMS).doubt("mixture", {"0.1": norm})


def test_too_few_observations_judge_nothing_and_modules_are_apart() -> None:
    assert not after([1.0] * (MIN_NORMS - 1)).doubt("mixture", {"0.1": 1e9})
    norms = after([1.0] * MIN_NORMS)
    assert not norms.doubt("mixture", {"0.0": 1e9})
    assert not norms.doubt("dense", {"0.1": 1e9})
    assert norms.doubt("mixture", {"0.0": 1e9, "0.1": 1e9})


def test_without_a_factor_everything_is_believed() -> None:
    norms = Norms(None)
    for _ in range(WINDOW):
        norms.learn("mixture", {"0.1": 1.0})
    assert not norms.doubt("mixture", {"0.1": 0.0})


@given(st.lists(st.floats(0.5, 2.0), min_size=WINDOW, max_size=WINDOW), st.integers(0, (WINDOW - 1) // 2))
def test_a_minority_of_wrong_norms_does_not_make_a_wrong_one_right(honest: list[float], wrong: int) -> None:
    history = [*honest[wrong:], *[1e6] * wrong]
    norms = after(history)
    assert not any(norms.doubt("mixture", {"0.1": norm}) for norm in honest[wrong:])
    assert norms.doubt("mixture", {"0.1": 1e6})


@pytest.mark.parametrize("contributions", [1, 4])
def test_a_warm_up_and_a_cosine_decay_to_a_tenth_are_believed(contributions: int) -> None:
    """Norms follow the learning rate: 4 phases up from a tenth, 20 phases down to a tenth, spread by a half."""
    norms = Norms(FACTOR)
    for phase in range(24):
        rate = 0.1 + 0.9 * phase / 4 if phase < 4 else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (phase - 4) / 19))
        for shard in range(contributions):
            norm = rate * (1.0 + 0.5 * math.sin(7.0 * phase + shard))
            assert not norms.doubt("mixture", {"0.1": norm}), (phase, norm)
            norms.learn("mixture", {"0.1": norm})


def test_a_new_level_that_workers_agree_on_becomes_the_usual_one() -> None:
    norms = after([1.0] * WINDOW)
    for _ in range(WINDOW // 2 + 1):
        norms.learn("mixture", {"0.1": 100.0})
    assert not norms.doubt("mixture", {"0.1": 100.0})
