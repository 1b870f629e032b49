from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from corpus.windows import windows


@given(st.lists(st.integers(2, 99), max_size=60), st.integers(2, 20), st.booleans())
def test_windows_hold_every_token_once_behind_a_bos(tokens: list[int], length: int, complete: bool) -> None:
    cut = list(windows(tokens, length, 0, 1, complete))
    assert all(window[0] == 0 and 2 <= len(window) <= length for window in cut)
    assert [token for window in cut for token in window[1:]] == tokens + ([1] if complete else [])
    assert all(len(window) == length for window in cut[:-1])


def test_eos_counts_within_the_window() -> None:
    assert list(windows([5, 6, 7], 4, 0, 1)) == [[0, 5, 6, 7], [0, 1]]
    assert list(windows([5, 6], 4, 0, 1)) == [[0, 5, 6, 1]]
