"""Nearest, most typical and lonely rows, each document named once."""

from __future__ import annotations

import numpy as np
import pytest

from routing.neighbours import most_typical, nearest, own_distances

ROWS = np.array([[0.0, 0.0], [0.0, 1.0], [3.0, 4.0], [0.0, 1.0], [9.0, 0.0]])
DOCUMENTS = np.array([7, 7, 8, 9, 3], np.uint64)


def test_the_nearest_rows_come_in_order_with_their_distances_one_a_document() -> None:
    chosen, distances = nearest(ROWS, np.zeros(2), DOCUMENTS, 3)
    assert chosen.tolist() == [0, 3, 2]
    assert distances.tolist() == [0.0, 1.0, 5.0]


def test_of_rows_at_the_same_distance_the_lower_index_is_first() -> None:
    chosen, _ = nearest(ROWS, np.array([0.0, 1.0]), DOCUMENTS, 5)
    assert chosen.tolist() == [1, 3, 2, 4]


def test_the_most_typical_row_is_nearest_to_the_mean() -> None:
    chosen, distances = most_typical(ROWS, DOCUMENTS, 1)
    assert chosen.tolist() == [1]  # the mean is (2.4, 1.2), and row 3 ties with row 1
    assert distances[0] == pytest.approx(np.hypot(2.4, 0.2))


def test_a_rows_own_distance_is_to_another_document() -> None:
    assert own_distances(ROWS, DOCUMENTS) == pytest.approx([1.0, 0.0, np.sqrt(18), 0.0, np.sqrt(52)])
    assert np.isinf(own_distances(ROWS[:2], DOCUMENTS[:2])).all()


def test_own_distances_over_several_blocks_are_those_of_every_pair() -> None:
    rows = np.random.default_rng(0).normal(size=(300, 4))
    documents = np.repeat(np.arange(100), 3).astype(np.uint64)
    pairs = np.sqrt(((rows[:, None] - rows) ** 2).sum(axis=2))
    pairs[documents[:, None] == documents] = np.inf
    assert own_distances(rows, documents) == pytest.approx(pairs.min(axis=1))
