"""Loads of paths, and what they are worth where the sequences of a document go alike."""

from __future__ import annotations

import numpy as np
import pytest

from routing.drift import index_by_chance, stability_index
from routing.load import PathLoad

GENERATOR = np.random.default_rng(5)


def load_of(paths: np.ndarray, documents: np.ndarray, num_paths: int = 4) -> PathLoad:
    load = PathLoad(num_paths)
    load.add(paths, documents)
    return load


def clustered(documents: int, sequences: int, num_paths: int = 4) -> PathLoad:
    """Documents with tastes of their own, drawn around one distribution."""
    tastes = GENERATOR.dirichlet(np.full(num_paths, 1.5), documents)
    counts = np.array([GENERATOR.multinomial(sequences, taste) for taste in tastes])
    paths = np.concatenate([np.repeat(np.arange(num_paths), row) for row in counts])
    return load_of(paths, np.repeat(np.arange(documents), sequences), num_paths)


def test_counts_and_shares() -> None:
    load = load_of(np.array([0, 0, 2, 3]), np.array([5, 5, 9, 9], np.uint64))
    assert load.counts.tolist() == [2, 0, 1, 1]
    assert load.shares.tolist() == [0.5, 0.0, 0.25, 0.25]
    assert (load.sequences, load.documents) == (4, 2)


def test_batches_add_up() -> None:
    paths, documents = GENERATOR.integers(0, 4, 300), np.repeat(np.arange(50), 6)
    whole, parts = load_of(paths, documents), PathLoad(4)
    for start in range(0, 300, 60):
        parts.add(paths[start : start + 60], documents[start : start + 60])
    assert np.array_equal(whole.counts, parts.counts)
    assert whole.documents == parts.documents
    assert whole.effective_size == pytest.approx(parts.effective_size)


def test_independent_sequences_count_as_many_as_they_are() -> None:
    paths = GENERATOR.choice(4, 4000, p=[0.5, 0.3, 0.15, 0.05])
    assert load_of(paths, np.arange(4000)).effective_size == 4000
    assert load_of(paths, np.repeat(np.arange(1000), 4)).effective_size > 3500


def test_documents_that_take_one_path_count_once() -> None:
    paths = np.repeat(GENERATOR.choice(4, 200, p=[0.5, 0.3, 0.15, 0.05]), 7)
    assert load_of(paths, np.repeat(np.arange(200), 7)).effective_size == pytest.approx(200, rel=0.02)


def test_one_document_and_one_path_are_worth_their_documents() -> None:
    assert load_of(np.array([0, 1, 2]), np.zeros(3)).effective_size == 1
    assert load_of(np.zeros(30, np.int64), np.repeat(np.arange(10), 3)).effective_size == 10


def test_chance_counts_what_sequences_are_worth() -> None:
    """Of pairs of samples that differ by nothing, 95 % stay under; had sequences been independent, far fewer would."""
    under, naive = [], []
    for _ in range(300):
        first, second = clustered(80, 10), clustered(60, 12)
        index = float(stability_index(first.counts, second.counts))
        under.append(index <= index_by_chance(4, first.effective_size, second.effective_size))
        naive.append(index <= index_by_chance(4, float(first.sequences), float(second.sequences)))
    assert 0.90 < np.mean(under) < 0.99
    assert np.mean(naive) < 0.65
