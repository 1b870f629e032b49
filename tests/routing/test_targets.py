"""Targets of the router LM: the best path for the next tokens, by hand on small tables and against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routing.targets import NO_TARGET, best_next_paths, targets_of

# One sequence of five counted tokens under two paths.
FIRST = np.array([[1.0, 5.0, 1.0, 1.0, 4.0]])
SECOND = np.array([[2.0, 1.0, 3.0, 3.0, 1.0]])


@pytest.mark.parametrize(
    ("window", "best"),
    [
        (1, [0, 1, 0, 0, 1]),
        # 6 against 3, 6 against 4, 2 against 6, 5 against 4, then what is left: 4 against 1.
        (2, [1, 1, 0, 1, 1]),
        # 7 against 6, 7 against 7 (the lower path), 6 against 7, 5 against 4, 4 against 1.
        (3, [1, 0, 0, 1, 1]),
        # 12 against 10, 11 against 8, 6 against 7, 5 against 4, 4 against 1: to the end of the text.
        (5, [1, 1, 0, 1, 1]),
        (500, [1, 1, 0, 1, 1]),
    ],
)
def test_the_path_with_the_least_loss_of_the_next_tokens(window: int, best: list[int]) -> None:
    found = best_next_paths([FIRST, SECOND], window)
    assert found.dtype == np.uint16
    assert found.tolist() == [best]


def test_of_equal_paths_the_first_is_the_target() -> None:
    assert best_next_paths([FIRST, FIRST.copy(), FIRST.copy()], 2).tolist() == [[0] * 5]
    assert best_next_paths([SECOND, FIRST, SECOND.copy()], 5).tolist() == [[0, 0, 1, 0, 0]]


def test_bos_the_prefix_and_the_last_token_have_no_target() -> None:
    best = np.array([3, 1, 4, 1, 5], np.uint16)
    # BOS, three tokens of prefix, of which the last decides for what follows, four counted tokens.
    assert targets_of(best, length=8, prefix_tokens=3).tolist() == [NO_TARGET] * 3 + [3, 1, 4, 1] + [NO_TARGET]
    assert targets_of(best, length=5, prefix_tokens=3).tolist() == [NO_TARGET] * 3 + [3, NO_TARGET]
    assert targets_of(best, length=4, prefix_tokens=3).tolist() == [NO_TARGET] * 4
    assert targets_of(best, length=2, prefix_tokens=3).tolist() == [NO_TARGET] * 2


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 12), st.integers(1, 5), st.integers(1, 15))
def test_equals_sums_written_out(seed: int, sequences: int, tokens: int, paths: int, window: int) -> None:
    # Whole numbers are summed exactly, so that ties are ties.
    losses = np.random.default_rng(seed).integers(0, 6, (paths, sequences, tokens)).astype(np.float64)
    found = best_next_paths(iter(losses), window)
    for n in range(sequences):
        for c in range(tokens):
            assert found[n, c] == losses[:, n, c : c + window].sum(axis=1).argmin()
