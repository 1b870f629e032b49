"""A gater learns the best path from features, hands out what the labels have, and never starves or crashes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import ShardingConfig
from configs.stages import GaterConfig
from routing.gating import FittedGater, best_paths, fit_gater
from routing.kmeans import CannotFit
from routing.records import Assignments
from routing.sharding import divide

PLAIN = GaterConfig(capacity=None, match_labels=False)


def planted(
    shares: tuple[float, ...], count: int = 400, spread: float = 0.3, seed: int = 5
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Ids, features about a corner a path, losses lowest for the path of the corner, and that path."""
    generator = np.random.default_rng(seed)
    num_paths = len(shares)
    truth = generator.choice(num_paths, count, p=shares)
    z = generator.normal(scale=spread, size=(count, num_paths + 3))
    z[np.arange(count), truth] += 1.0
    losses = 100.0 + generator.exponential(5.0, size=(count, num_paths))
    losses[np.arange(count), truth] -= 40.0
    return generator.permutation(count).astype(np.uint64) * 7 + 1, z.astype(np.float32), losses, truth


def collapse() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, features and losses where path 0 is the best of 78 % of the sequences, most of them hardly so."""
    ids, z, losses, _ = planted((0.4, 0.2, 0.2, 0.2), 600, spread=0.5)
    losses[:, 0] -= 42.0
    assert 0.7 < (losses.argmin(axis=1) == 0).mean() < 0.9
    return ids, z, losses


def same(first: FittedGater, second: FittedGater) -> bool:
    return (
        first.gater.to_bytes() == second.gater.to_bytes()
        and np.array_equal(first.labels, second.labels)
        and first.gater_loss == second.gater_loss
        and first.agreement_with_labels == second.agreement_with_labels
    )


@pytest.mark.parametrize("transform", ["none", "standardize", "whiten"])
@pytest.mark.parametrize("capacity", [None, 1.25])
@pytest.mark.parametrize("num_paths", [2, 3, 8])
def test_planted_paths_are_found(transform: str, capacity: float | None, num_paths: int) -> None:
    ids, z, losses, truth = planted((1 / num_paths,) * num_paths, spread=0.1)
    config = GaterConfig.model_validate({"transform": transform, "capacity": capacity, "regularization": 0.01})
    fitted = fit_gater(ids, z, losses, config, 24)
    assert fitted.gater.prefix_tokens == 24
    assert fitted.gater.num_paths == num_paths
    assert fitted.converged
    assert (fitted.gater.paths(z) == truth).mean() > 0.97
    assert fitted.agreement_with_best > 0.97


@pytest.mark.parametrize("num_paths", [2, 4])
@pytest.mark.parametrize("regularization", [0.1, 1.0, 30.0])
def test_the_fit_is_where_the_documented_sum_is_least(num_paths: int, regularization: float) -> None:
    ids, z, losses, truth = planted((1 / num_paths,) * num_paths, 200)
    gater = fit_gater(ids, z, losses, PLAIN.model_copy(update={"regularization": regularization}), 32).gater
    residual = gater.posterior(z) - np.eye(num_paths)[truth]  # derivative of the cross entropy by the logits
    slope = gater.transform(z).T @ residual + regularization * gater.weights
    assert np.abs(gater.transform(z).T @ residual).max() > 0.02
    assert np.abs(slope).max() < 0.01
    assert np.abs(residual.sum(axis=0)).max() < 0.01


@pytest.mark.parametrize("num_paths", [2, 4])
def test_soft_labels_are_the_shares_of_the_paths(num_paths: int) -> None:
    """The fit is where the sum with distributions for labels is least."""
    ids, z, losses, _ = planted((1 / num_paths,) * num_paths, 200)
    losses = losses + np.random.default_rng(3).uniform(0, 3, losses.shape)
    config = GaterConfig(capacity=None, match_labels=False, temperature=20.0, transform=PLAIN.transform)
    gater = fit_gater(ids, z, losses, config, 32).gater
    shares = np.exp(-losses / 20.0)
    residual = gater.posterior(z) - shares / shares.sum(axis=1, keepdims=True)
    assert np.abs(gater.transform(z).T @ residual + gater.weights).max() < 0.05
    hard = fit_gater(ids, z, losses, config.model_copy(update={"temperature": None}), 32).gater
    assert gater.posterior(z).max(axis=1).mean() < hard.posterior(z).max(axis=1).mean()


def test_a_path_without_a_score_has_no_share() -> None:
    ids, z, losses, _ = planted((0.25,) * 4, 200)
    losses = losses.copy()
    losses[:, 2] = np.inf
    config = GaterConfig(capacity=None, match_labels=False, temperature=50.0)
    fitted = fit_gater(ids, z, losses, config, 32)
    assert fitted.gater.posterior(z)[:, 2].max() < 1e-9
    assert fitted.gater_shares[2] == 0.0


def test_the_larger_the_regularization_the_flatter_the_posterior() -> None:
    ids, z, losses, _ = planted((0.25,) * 4)
    heights = [
        fit_gater(ids, z, losses, GaterConfig(regularization=value), 32).gater.posterior(z).max(axis=1).mean()
        for value in (0.01, 1.0, 100.0)
    ]
    assert heights == sorted(heights, reverse=True)


def test_a_fit_depends_neither_on_the_order_of_the_sequences_nor_on_chance() -> None:
    ids, z, losses = collapse()
    turned = np.random.default_rng(1).permutation(len(ids))
    config = GaterConfig(transform="whiten")
    fitted = fit_gater(ids, z, losses, config, 32)
    assert same(fitted, fit_gater(ids, z, losses, config, 32))
    assert same(fitted, fit_gater(ids[turned], z[turned], losses[turned], config, 32))
    assert fitted.ids.tolist() == sorted(ids.tolist())


def test_where_one_path_is_the_best_of_most_the_capacity_and_the_bias_keep_the_others() -> None:
    ids, z, losses = collapse()
    free = fit_gater(ids, z, losses, PLAIN, 32)
    assert free.gater_shares.max() > 0.75
    kept = fit_gater(ids, z, losses, GaterConfig(), 32)
    assert kept.best_shares.tolist() == free.best_shares.tolist()
    assert kept.label_shares.max() <= math.ceil(1.25 * 600 / 4) / 600
    assert kept.gater_shares == pytest.approx(kept.label_shares, abs=2 / 600)
    assert kept.gater_shares.min() > 0.1


def test_matched_labels_feed_a_path_that_argmax_would_starve() -> None:
    ids, z, losses, _ = planted((0.9, 0.05, 0.05), spread=1.5)
    starved = fit_gater(ids, z, losses, PLAIN, 32)
    assert starved.gater_shares.min() < 0.3 * starved.label_shares.min()
    matched = fit_gater(ids, z, losses, PLAIN.model_copy(update={"match_labels": True}), 32)
    assert matched.label_shares.tolist() == starved.label_shares.tolist()
    assert matched.gater_shares == pytest.approx(matched.label_shares, abs=2 / 400)
    assert np.array_equal(matched.gater.weights, starved.gater.weights)
    assert matched.gater.logits(z).sum(axis=1) == pytest.approx(np.zeros(400), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(0, 40), st.floats(1.0, 3.0), st.floats(0.0, 0.9), st.integers(0, 2**32 - 1))
def test_no_path_labels_more_than_its_capacity_or_nothing(
    num_paths: int, more: int, capacity: float, unscored: float, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    losses = generator.exponential(size=(2 * num_paths + more, num_paths)) * np.geomspace(1, 9, num_paths)
    keep = generator.integers(num_paths, size=len(losses))
    hidden = generator.random(losses.shape) < unscored
    hidden[np.arange(len(losses)), keep] = False
    losses[hidden] = np.inf
    sizes = np.bincount(best_paths(losses, capacity), minlength=num_paths)
    assert sizes.max() <= math.ceil(capacity * len(losses) / num_paths)
    assert sizes.min() >= 1
    assert np.array_equal(best_paths(losses, None), losses.argmin(axis=1))


def test_those_who_lose_most_by_their_second_best_keep_their_best() -> None:
    losses = np.array([[50.0, 51.0], [10.0, 15.0], [70.0, 73.0], [4.0, 9.0]])
    assert best_paths(losses, 1.0).tolist() == [1, 0, 1, 0]


def test_a_sequence_scored_under_one_path_comes_first_and_overflow_goes_where_there_is_room() -> None:
    inf = np.inf
    losses = np.array([[1.0, inf, inf], [1.0, 90.0, inf], [1.0, 2.0, inf], [1.0, inf, inf], [5.0, 1.0, 9.0]])
    labels = best_paths(losses, 1.0)
    assert labels[[0, 3]].tolist() == [0, 0]
    assert labels[1] == 1
    assert np.bincount(labels, minlength=3).tolist() == [2, 2, 1]
    only = np.array([[1.0, inf, inf]] * 6)
    assert np.bincount(best_paths(only, 2.0)).tolist() == [4, 1, 1]


def test_an_empty_path_takes_the_sequence_that_loses_least_by_it_not_the_shortest() -> None:
    losses = np.array([[10.0, 20.0], [1000.0, 1001.0], [900.0, 950.0], [30.0, 60.0]])
    assert best_paths(losses, 2.0).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("match_labels", [True, False])
@pytest.mark.parametrize("num_paths", [2, 3, 5])
def test_a_path_that_is_no_label_has_a_class_that_nobody_is_routed_to(num_paths: int, match_labels: bool) -> None:
    ids, z, losses, _ = planted((1 / num_paths,) * num_paths)
    losses[:, 1] = 500.0
    fitted = fit_gater(ids, z, losses, PLAIN.model_copy(update={"match_labels": match_labels}), 32)
    assert fitted.label_shares[1] == fitted.gater_shares[1] == 0.0
    far = np.random.default_rng(2).normal(scale=50, size=(500, z.shape[1]))
    posterior = fitted.gater.posterior(far)
    assert (posterior[:, 1] < 1e-12).all()
    assert np.isfinite(fitted.gater.nearest(far, num_paths)[1]).all()


def test_one_path_takes_all() -> None:
    ids, z, losses, _ = planted((1.0,))
    fitted = fit_gater(ids, z, losses, GaterConfig(), 32)
    assert fitted.gater.posterior(z).tolist() == [[1.0]] * len(z)
    assert fitted.best_loss == fitted.label_loss == fitted.gater_loss == losses.mean()


@pytest.mark.parametrize("transform", ["none", "standardize"])
def test_features_that_say_nothing_give_a_gater_all_the_same(transform: str) -> None:
    ids, z, losses, _ = planted((0.25,) * 4)
    config = GaterConfig.model_validate({"transform": transform})
    fitted = fit_gater(ids, np.ones_like(z), losses, config, 32)
    assert np.isfinite(fitted.gater.posterior(z)).all()


def test_the_reported_losses_are_those_of_the_best_of_the_labels_and_of_the_gater() -> None:
    ids, z, losses = collapse()
    order = np.argsort(ids)
    fitted = fit_gater(ids, z, losses, GaterConfig(), 32)
    rows = np.arange(len(ids))
    sorted_losses, paths = losses[order], fitted.gater.paths(z[order])
    assert fitted.best_loss == pytest.approx(sorted_losses.min(axis=1).mean())
    assert fitted.label_loss == pytest.approx(sorted_losses[rows, fitted.labels].mean())
    assert fitted.gater_loss == pytest.approx(sorted_losses[rows, paths].mean())
    assert fitted.best_loss < fitted.label_loss
    assert fitted.agreement_with_labels == (paths == fitted.labels).mean()
    assert fitted.agreement_with_best == (paths == sorted_losses.argmin(axis=1)).mean()
    assert fitted.unscored_share == 0.0


def test_a_path_without_a_score_counts_as_the_worst_of_those_scored() -> None:
    ids, z, losses, truth = planted((0.25,) * 4)
    hidden = losses.copy()
    hidden[np.arange(len(truth)), (truth + 1) % 4] = np.inf
    hidden[::10] = np.where(np.arange(4) == ((truth[::10] + 1) % 4)[:, None], losses[::10], np.inf)
    fitted = fit_gater(ids, z, hidden, PLAIN, 32)
    order = np.argsort(ids)
    paths, table = fitted.gater.paths(z[order]), hidden[order]
    expected = []
    for row, path in enumerate(paths):
        scored = table[row][np.isfinite(table[row])]
        expected.append(table[row, path] if np.isfinite(table[row, path]) else scored.max())
    assert fitted.gater_loss == pytest.approx(np.mean(expected))
    assert 0.0 < fitted.unscored_share == pytest.approx(np.isinf(table[np.arange(len(paths)), paths]).mean())
    assert fitted.best_loss <= fitted.gater_loss


def test_capped_shards_of_a_gater_are_never_empty() -> None:
    ids, z, losses = collapse()
    gater = fit_gater(ids, z, losses, PLAIN, 32).gater
    shards, distances = gater.nearest(z, 4)
    assignments = Assignments(ids, shards.astype(np.uint32), distances.astype(np.float32))
    plain = divide(assignments, 4, ShardingConfig())
    assert max(map(len, plain)) > 0.75 * 600
    capped = divide(assignments, 4, ShardingConfig(capacity=1.25))
    assert max(map(len, capped)) <= math.ceil(1.25 * 600 / 4)
    assert min(map(len, capped)) >= 600 - 3 * math.ceil(1.25 * 600 / 4)
    doubled = divide(assignments, 4, ShardingConfig(capacity=1.25, overlap=2))
    assert sum(map(len, doubled)) == 2 * 600
    losses[:, 3] = 1e6
    absent = fit_gater(ids, z, losses, PLAIN, 32).gater
    shards, distances = absent.nearest(z, 4)
    assignments = Assignments(ids, shards.astype(np.uint32), distances.astype(np.float32))
    assert min(map(len, divide(assignments, 4, ShardingConfig(capacity=1.25)))) >= 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("few", r"7 router sequences are too few for 4 paths \(at least 8\).*corpus\.splits\.router"),
        ("features", r"features.*inner\.learning_rate"),
        ("unscored", "1 of 400 router sequences have no finite loss"),
        ("nan", r"NaN.*inner\.learning_rate"),
        ("alike", "same features"),
    ],
)
def test_what_no_gater_can_be_fitted_to_is_refused(spoil: str, message: str) -> None:
    ids, z, losses, _ = planted((0.25,) * 4)
    config = GaterConfig(transform="whiten")
    if spoil == "few":
        ids, z, losses = ids[:7], z[:7], losses[:7]
    elif spoil == "features":
        z[5, 1] = np.inf
    elif spoil == "unscored":
        losses[9] = np.inf
    elif spoil == "nan":
        losses[9, 2] = np.nan
    else:
        z[:] = 1.0
    with pytest.raises(CannotFit, match=message):
        fit_gater(ids, z, losses, config, 32)
