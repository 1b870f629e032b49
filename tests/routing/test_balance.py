"""Shifts with which argmax hands out what is wanted, where plain argmax starves somebody."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routing.balance import matched_shift


def handed(logits: np.ndarray, shift: np.ndarray | float = 0.0) -> list[int]:
    counts: list[int] = np.bincount((logits + shift).argmax(axis=1), minlength=logits.shape[1]).tolist()
    return counts


def test_no_shift_where_argmax_hands_out_what_is_wanted() -> None:
    logits = np.random.default_rng(0).normal(size=(90, 3))
    assert matched_shift(logits, np.array(handed(logits))).tolist() == [0.0, 0.0, 0.0]


def test_a_starved_path_gets_its_rows_and_those_that_lean_to_it_most() -> None:
    logits = np.stack([np.full(10, 5.0), np.arange(10) / 10], axis=1)
    assert handed(logits) == [10, 0]
    shift = matched_shift(logits, np.array([7, 3]))
    assert (logits + shift).argmax(axis=1).tolist() == [0] * 7 + [1] * 3


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 9), st.integers(0, 300), st.floats(1e-3, 1e3), st.integers(0, 2**32 - 1))
def test_rows_that_differ_are_handed_out_as_wanted(paths: int, more: int, scale: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    logits = scale * (generator.normal(size=(2 * paths + more, paths)) + generator.normal(scale=3, size=paths))
    wanted = 1 + generator.multinomial(len(logits) - paths, generator.dirichlet(np.ones(paths)))
    shift = matched_shift(logits, wanted)
    assert np.abs(np.array(handed(logits, shift)) - wanted).sum() <= 2
    assert min(handed(logits, shift)) >= 1
    assert np.array_equal(shift, matched_shift(logits, wanted))


def test_many_paths_that_two_features_tell_apart_get_what_is_wanted() -> None:
    """Path after path alone stands still far from it: a path takes its rows from the same neighbours every time."""
    generator = np.random.default_rng(0)
    logits = 3 * generator.normal(size=(800, 2)) @ generator.normal(size=(2, 32)) + generator.normal(scale=3, size=32)
    wanted = 1 + generator.multinomial(len(logits) - 32, generator.dirichlet(np.full(32, 0.5)))
    assert np.maximum(np.array(handed(logits)) - wanted, 0).sum() > 500
    given_out = np.array(handed(logits, matched_shift(logits, wanted)))
    assert given_out.min() >= 1
    assert np.maximum(given_out - wanted, 0).sum() <= 4


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_rows_that_are_alike_do_not_make_it_worse(paths: int, more: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    logits = generator.integers(0, 2, size=(paths + more, paths)).astype(np.float64)
    wanted = 1 + generator.multinomial(more, np.full(paths, 1 / paths))
    shift = matched_shift(logits, wanted)
    assert np.isfinite(shift).all()
    before, after = np.array(handed(logits)), np.array(handed(logits, shift))
    assert (after == 0).sum() <= (before == 0).sum()
    if (after == 0).sum() == (before == 0).sum():
        assert np.abs(after - wanted).sum() <= np.abs(before - wanted).sum()


@pytest.mark.parametrize("value", [0.0, 1e300, -3.0])
def test_equal_logits_have_no_shift(value: float) -> None:
    assert matched_shift(np.full((8, 2), value), np.array([4, 4])).tolist() == [0.0, 0.0]
