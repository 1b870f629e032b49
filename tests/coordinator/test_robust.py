"""Robust averages against plain definitions, against numbers worked out by hand, and against liars."""

from __future__ import annotations

import statistics
from itertools import permutations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.schema import OuterConfig
from coordinator.outer import contribution_weights
from coordinator.robust import robust_average, weighted_median, weighted_trimmed_mean

VALUES = st.floats(-1e6, 1e6, width=32)
TRIMMED, MEDIAN = OuterConfig(average="trimmed_mean", trim_share=0.25), OuterConfig(average="median")


def column(*values: float) -> npt.NDArray[np.float32]:
    """Contributions of one element."""
    return np.array([[value] for value in values], np.float32)


def equal(count: int) -> tuple[float, ...]:
    return contribution_weights([7] * count)


@given(st.lists(VALUES, min_size=3, max_size=24))
def test_with_equal_weights_the_median_is_the_usual_one(values: list[float]) -> None:
    [found] = weighted_median(column(*values), equal(len(values)))
    assert found == np.float32(statistics.median(values))


@given(st.lists(VALUES, min_size=5, max_size=20), st.integers(1, 2))
def test_with_equal_weights_the_trimmed_mean_leaves_out_whole_values(values: list[float], cut: int) -> None:
    [found] = weighted_trimmed_mean(column(*values), equal(len(values)), cut / len(values))
    assert found == pytest.approx(statistics.fmean(sorted(values)[cut:-cut]), rel=1e-5, abs=1e-3)


def test_numbers_by_hand() -> None:
    """Weights 1:2:3:4 of ten. Median of 10, 20, 30, 40: 0.6 of the weight lies up to 30. Trimmed by 0.2 at each end:
    10 (0.1) is cut, of 20 the last 0.1 of 0.2 counts, 30 counts 0.3, of 40 the first 0.2: (2 + 9 + 8) / 0.6.
    """
    weights = contribution_weights([1, 2, 3, 4])
    assert weighted_median(column(10, 20, 30, 40), weights)[0] == 30.0
    assert weighted_trimmed_mean(column(10, 20, 30, 40), weights, 0.2)[0] == pytest.approx(19 / 0.6)
    assert weighted_median(column(10, 20, 30), contribution_weights([1, 1, 2]))[0] == 25.0, "exactly half up to 20"


@given(st.lists(st.tuples(VALUES, st.integers(1, 9)), min_size=3, max_size=8))
def test_a_weight_counts_like_so_many_equal_contributions(parts: list[tuple[float, int]]) -> None:
    values, counts = zip(*parts, strict=True)
    repeated = [value for value, count in parts for _ in range(count)]
    weights = contribution_weights(counts)
    for average in (weighted_median, lambda chunks, shares: weighted_trimmed_mean(chunks, shares, 0.2)):
        [found] = average(column(*values), weights)
        [unrolled] = average(column(*repeated), equal(len(repeated)))
        assert found == pytest.approx(unrolled, rel=1e-5, abs=1e-3)


@pytest.mark.parametrize("outer", [TRIMMED, MEDIAN], ids=["trimmed", "median"])
@given(honest=st.lists(VALUES, min_size=4, max_size=9), lie=st.floats(allow_nan=False, width=32))
def test_a_liar_moves_the_average_no_farther_than_honest_values_lie(
    outer: OuterConfig, honest: list[float], lie: float
) -> None:
    liars = 1 if outer is MEDIAN or len(honest) >= 4 else 0
    average = robust_average(outer, len(honest) + liars)
    assert average is not None
    with np.errstate(all="ignore"):
        [found] = average(column(*honest, *[lie] * liars), equal(len(honest) + liars))
    least, most = np.float32(min(honest)), np.float32(max(honest))
    slack = 1e-6 * max(abs(float(least)), abs(float(most)))
    assert least - slack <= found <= most + slack


@pytest.mark.parametrize("outer", [TRIMMED, MEDIAN], ids=["trimmed", "median"])
def test_the_order_of_contributions_changes_no_bit(outer: OuterConfig) -> None:
    """Also where shards are numbered in another way."""
    generator = np.random.default_rng(0)
    chunks = generator.standard_normal((4, 50)).astype(np.float32)
    average = robust_average(outer, 4)
    assert average is not None
    weights = equal(4)
    expected = average(chunks, weights)
    for order in permutations(range(4)):
        assert average(chunks[list(order)], weights).tobytes() == expected.tobytes()


@given(st.integers(1, 40))
def test_chunk_size_changes_no_bit(chunk_elements: int) -> None:
    chunks = np.random.default_rng(3).standard_normal((5, 40)).astype(np.float32)
    weights = contribution_weights([3, 1, 4, 1, 5])
    for outer in (TRIMMED, MEDIAN):
        average = robust_average(outer, 5)
        assert average is not None
        parts = [average(chunks[:, at : at + chunk_elements], weights) for at in range(0, 40, chunk_elements)]
        assert np.concatenate(parts).tobytes() == average(chunks, weights).tobytes()


def test_below_three_contributions_and_by_default_it_is_the_mean() -> None:
    assert robust_average(MEDIAN, 2) is None
    assert robust_average(TRIMMED, 1) is None
    assert robust_average(MEDIAN, 3) is not None
    assert robust_average(OuterConfig(), 100) is None
