"""Transforms of features, and products whose rows do not know of each other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routing.transform import fit_transform, row_products

Z = np.random.default_rng(3).normal(size=(300, 6)) @ np.diag([1, 2, 3, 4, 5, 1e-3]) + np.arange(6)


def test_none_leaves_features_as_they_are() -> None:
    mean, matrix = fit_transform(Z, "none")
    assert np.array_equal((Z - mean) @ matrix, Z)


def test_standardised_features_have_mean_zero_and_unit_variance() -> None:
    mean, matrix = fit_transform(Z, "standardize")
    x = (Z - mean) @ matrix
    assert x.mean(axis=0) == pytest.approx(np.zeros(6), abs=1e-10)
    assert x.std(axis=0) == pytest.approx(np.ones(6))


def test_a_feature_that_never_changes_becomes_zero() -> None:
    mean, matrix = fit_transform(np.full((10, 1), 0.5), "standardize")
    assert np.array_equal((np.full((4, 1), 0.5) - mean) @ matrix, np.zeros((4, 1)))


def test_whitening_drops_what_never_changes() -> None:
    assert fit_transform(np.ones((10, 3)), "whiten")[1].shape == (3, 0)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 70), st.integers(1, 300), st.integers(1, 40), st.integers(0, 2**32 - 1), st.data())
def test_a_rows_products_have_the_same_bits_alone_and_among_others(
    rows: int, size: int, columns: int, seed: int, data: st.DataObject
) -> None:
    generator = np.random.default_rng(seed)
    left, right = generator.normal(size=(rows, size)), generator.normal(size=(size, columns))
    together = row_products(left, right)
    assert together == pytest.approx(left @ right, rel=1e-9, abs=1e-9)
    some = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=5))
    assert np.array_equal(row_products(left[some], right), together[some])
    assert np.array_equal(row_products(np.asfortranarray(left), np.asfortranarray(right)), together)


def test_there_may_be_no_rows() -> None:
    assert row_products(np.zeros((0, 3)), np.zeros((3, 2))).shape == (0, 2)
