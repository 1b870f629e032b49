"""Measures of drift: values worked out by hand, what chance makes of them, and features told apart."""

from __future__ import annotations

import math

import numpy as np
import pytest

from routing.drift import FeatureDrift, index_by_chance, jensen_shannon, stability_index, verdict

GENERATOR = np.random.default_rng(3)


def test_the_stability_index_is_the_sum_worked_out_by_hand() -> None:
    many = 1_000_000
    index = stability_index(np.array([5, 3, 2]) * many, np.array([2, 3, 5]) * many)
    assert float(index) == pytest.approx(2 * 0.3 * math.log(2.5), abs=1e-5)
    assert float(stability_index(np.array([2, 3, 5]), np.array([20, 30, 50]) * many)) < 0.01


def test_the_stability_index_is_symmetric_and_zero_where_shares_are_alike() -> None:
    p, q = GENERATOR.integers(1, 50, (4, 7)), GENERATOR.integers(1, 50, (4, 7))
    assert stability_index(p, q) == pytest.approx(stability_index(q, p))
    assert (stability_index(p, q) > 0).all()
    assert stability_index(p, p) == pytest.approx(np.zeros(4))


def test_a_path_that_nothing_takes_leaves_the_index_finite() -> None:
    index = float(stability_index(np.array([10, 0]), np.array([0, 10])))
    share = 10.5 / 11
    assert index == pytest.approx(2 * (share - (1 - share)) * math.log(share / (1 - share)))


@pytest.mark.parametrize(("bins", "quantile"), [(2, 3.841), (4, 7.815), (10, 16.919), (256, 293.248)])
def test_chance_is_the_quantile_of_chi_squared_over_the_sizes(bins: int, quantile: float) -> None:
    assert index_by_chance(bins, 100.0, 400.0) == pytest.approx(quantile * (1 / 100 + 1 / 400), rel=0.03)


def test_one_path_cannot_drift() -> None:
    assert index_by_chance(1, 10.0, 10.0) == 0.0
    assert float(stability_index(np.array([7]), np.array([90]))) == 0.0


def test_samples_of_one_distribution_stay_under_the_chance_in_95_of_100() -> None:
    shares = np.array([0.4, 0.25, 0.2, 0.1, 0.05])
    first, second = GENERATOR.multinomial(300, shares, 4000), GENERATOR.multinomial(500, shares, 4000)
    under = (stability_index(first, second) <= index_by_chance(5, 300.0, 500.0)).mean()
    assert 0.93 < under < 0.97


def test_a_verdict_asks_for_chance_first_and_then_for_the_size() -> None:
    assert verdict(0.3, 0.4) == "no more than chance"
    assert [verdict(index, 0.01) for index in (0.05, 0.1, 0.2, 0.25)] == ["small", "moderate", "moderate", "large"]


def test_jensen_shannon_is_0_alike_1_apart_and_right_between() -> None:
    p = np.array([0.5, 0.5, 0.0])
    assert jensen_shannon(p, p) == 0.0
    assert jensen_shannon(p, np.array([0.0, 0.0, 1.0])) == 1.0
    # against (1, 0, 0): the middle is (3/4, 1/4, 0)
    by_hand = 0.5 * (0.5 * math.log2(2 / 3) + 0.5 * math.log2(2)) + 0.5 * math.log2(4 / 3)
    assert jensen_shannon(p, np.array([1.0, 0.0, 0.0])) == pytest.approx(by_hand)


def test_features_without_drift_stay_within_chance() -> None:
    drift = FeatureDrift(GENERATOR.normal(size=(1000, 16)))
    drift.add(GENERATOR.normal(size=(800, 16)))
    summary = drift.summary()
    assert summary is not None
    assert summary.psi_median < index_by_chance(10, 1000.0, 800.0)
    assert summary.psi_above_large == 0
    assert summary.rms_shift < 2 * math.sqrt(1 / 1000 + 1 / 800)


def test_a_feature_that_moved_is_named_first_with_how_far() -> None:
    reference = GENERATOR.normal(loc=3.0, scale=2.0, size=(1000, 6))
    live = GENERATOR.normal(loc=3.0, scale=2.0, size=(1000, 6))
    live[:, 4] -= 3.0
    drift = FeatureDrift(reference)
    drift.add(live)
    summary = drift.summary(largest=2)
    assert summary is not None
    assert len(summary.largest) == 2
    feature, psi, shift = summary.largest[0]
    assert (feature, psi) == (4, summary.psi_highest)
    assert shift == pytest.approx(-1.5, abs=0.15)
    assert summary.psi_above_large == 1
    assert summary.rms_shift == pytest.approx(1.5 / math.sqrt(6), abs=0.1)


def test_a_feature_that_spreads_out_drifts_without_moving_its_mean() -> None:
    drift = FeatureDrift(GENERATOR.normal(size=(2000, 1)))
    drift.add(GENERATOR.normal(scale=4.0, size=(2000, 1)))
    summary = drift.summary()
    assert summary is not None
    assert summary.psi_highest > 1.0
    assert summary.rms_shift < 0.3


def test_slices_of_the_traffic_add_up() -> None:
    reference, live = GENERATOR.normal(size=(200, 5)), GENERATOR.normal(loc=0.5, size=(333, 5))
    whole, sliced = FeatureDrift(reference), FeatureDrift(reference)
    whole.add(live)
    for start in range(0, 333, 50):
        sliced.add(live[start : start + 50])
    first, second = whole.summary(), sliced.summary()
    assert first is not None
    assert second is not None
    assert (first.psi_median, first.psi_highest) == (second.psi_median, second.psi_highest)
    assert first.rms_shift == pytest.approx(second.rms_shift)


def test_a_feature_that_stood_still_in_training_is_left_out() -> None:
    reference = GENERATOR.normal(size=(100, 3))
    reference[:, 1] = 0.1
    drift = FeatureDrift(reference)
    drift.add(np.full((20, 3), 5.0))
    summary = drift.summary()
    assert summary is not None
    assert summary.features == 2
    assert {feature for feature, _, _ in summary.largest} == {0, 2}


def test_nothing_to_compare_is_said_as_nothing() -> None:
    assert FeatureDrift(GENERATOR.normal(size=(10, 3))).summary() is None
    still = FeatureDrift(np.ones((10, 3)))
    still.add(np.ones((5, 3)))
    assert still.summary() is None
