"""Fits find what is there, the same way every time, and a capacity leaves no shard too full or empty."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import LevelConfig, ShardingConfig, TopologyConfig
from model.topology import Topology
from routing import kmeans
from routing.clusters import Clusters
from routing.kmeans import CannotFit, capped_assignment, capped_choices, fit

GRID = Topology.from_config(
    TopologyConfig(levels=[LevelConfig(modules=2, blocks=[0], embedding=True), LevelConfig(modules=2, blocks=[1])])
)


def four_clusters(count: int = 400, dims: int = 8, shares: tuple[float, ...] = (0.25,) * 4) -> tuple[np.ndarray, ...]:
    """Ids, features and true clusters: four far corners, told apart by two of the dimensions each."""
    generator = np.random.default_rng(5)
    truth = generator.choice(4, count, p=shares)
    z = generator.normal(scale=0.3, size=(count, dims))
    z[:, : dims // 2] += 6.0 * (truth // 2)[:, None]
    z[:, dims // 2 :] += 6.0 * (truth % 2)[:, None]
    return generator.permutation(count).astype(np.uint64), z.astype(np.float32), truth


def purity(found: np.ndarray, truth: np.ndarray) -> float:
    """Share of rows whose shard's commonest true cluster is theirs."""
    return sum(int(np.bincount(truth[found == shard]).max()) for shard in np.unique(found)) / len(truth)


@pytest.mark.parametrize("kind", ["kmeans", "product-kmeans"])
@pytest.mark.parametrize("transform", ["none", "standardize"])
@pytest.mark.parametrize("capacity", [None, 1.25])
def test_clusters_that_are_there_are_found(kind: str, transform: str, capacity: float | None) -> None:
    ids, z, truth = four_clusters()
    config = ShardingConfig.model_validate(
        {"kind": kind, "transform": transform, "capacity": capacity, "prefix_tokens": 24}
    )
    clusters = fit(ids, z, config, GRID, 0)
    assert clusters.prefix_tokens == 24
    assert clusters.num_shards == clusters.num_paths == 4
    assert purity(clusters.paths(z), truth) == 1.0


def test_a_fit_does_not_depend_on_the_order_of_the_sample() -> None:
    ids, z, _ = four_clusters()
    turned = np.random.default_rng(1).permutation(len(ids))
    config = ShardingConfig(transform="whiten", capacity=1.1)
    assert fit(ids, z, config, GRID, 3).to_bytes() == fit(ids[turned], z[turned], config, GRID, 3).to_bytes()


def test_whitened_features_have_unit_covariance_and_lose_dimensions_without_variance() -> None:
    ids, z, _ = four_clusters()
    z = np.concatenate([z, z[:, :1], np.ones((len(z), 1), np.float32)], axis=1)
    clusters = fit(ids, z, ShardingConfig(transform="whiten"), GRID, 0)
    x = clusters.transform(z)
    assert x.shape[1] == 8
    assert x.T @ x / len(x) == pytest.approx(np.eye(8), abs=1e-6)


def test_the_sign_of_a_whitened_dimension_is_that_of_its_largest_weight() -> None:
    ids, z, _ = four_clusters()
    matrix = fit(ids, z, ShardingConfig(transform="whiten"), GRID, 0).matrix * z.std(axis=0)[:, None]
    assert (matrix[np.abs(matrix).argmax(axis=0), np.arange(matrix.shape[1])] > 0).all()


def test_product_clusters_take_a_group_of_dimensions_a_level() -> None:
    ids, z, _ = four_clusters()
    config = ShardingConfig(kind="product-kmeans", transform="none")
    halves = fit(ids, z, config, GRID, 0).groups
    assert [group.dimensions.tolist() for group in halves] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    components = fit(ids, z, config.model_copy(update={"transform": "whiten"}), GRID, 0).groups
    assert [group.dimensions.tolist() for group in components] == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_a_level_without_a_choice_or_with_a_module_a_path_takes_no_group() -> None:
    levels = [
        LevelConfig(modules=3, blocks=[0], embedding=True),
        LevelConfig(modules=1, blocks=[1]),
        LevelConfig(modules="path", blocks=[2]),
        LevelConfig(modules=2, blocks=[3], head=True),
    ]
    topology = Topology.from_config(TopologyConfig(levels=levels))
    ids, z, _ = four_clusters()
    clusters = fit(ids, z, ShardingConfig(kind="product-kmeans"), topology, 0)
    assert [len(group.centres) for group in clusters.groups] == [3, 2]
    assert clusters.num_paths == topology.num_paths == 6


def test_replicas_are_shards_of_their_own() -> None:
    topology = Topology.from_config(
        TopologyConfig(levels=[LevelConfig(modules=1, blocks=[0], embedding=True, head=True)], replicas=4)
    )
    ids, z, truth = four_clusters()
    clusters = fit(ids, z, ShardingConfig(), topology, 0)
    assert (clusters.num_shards, clusters.num_paths) == (4, 1)
    assert purity(clusters.nearest(z, 1)[0][:, 0], truth) == 1.0
    with pytest.raises(CannotFit, match=r"topology\.replicas"):
        fit(ids, z, ShardingConfig(kind="product-kmeans"), topology, 0)


def test_a_capacity_moves_the_centres_so_that_the_nearest_is_closer_to_balance() -> None:
    ids, z, _ = four_clusters(shares=(0.7, 0.1, 0.1, 0.1))

    def largest(clusters: Clusters) -> int:
        return int(np.bincount(clusters.paths(z), minlength=4).max())

    free = fit(ids, z, ShardingConfig(), GRID, 0)
    balanced = fit(ids, z, ShardingConfig(capacity=1.2), GRID, 0)
    assert largest(balanced) < largest(free)


def test_large_samples_are_fitted_in_mini_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, z, truth = four_clusters()
    plain = fit(ids, z, ShardingConfig(), GRID, 0)
    monkeypatch.setattr(kmeans, "MINIBATCH_ABOVE", 100)
    batched = fit(ids, z, ShardingConfig(), GRID, 0)
    assert batched.to_bytes() != plain.to_bytes()
    assert purity(batched.paths(z), truth) == 1.0


def test_features_that_are_not_finite_are_refused() -> None:
    ids, z, _ = four_clusters()
    z[3, 2] = np.nan
    with pytest.raises(CannotFit, match=r"inner\.learning_rate"):
        fit(ids, z, ShardingConfig(), GRID, 0)


def test_a_sample_below_two_a_shard_is_refused() -> None:
    ids, z, _ = four_clusters(count=7)
    with pytest.raises(CannotFit, match=r"sharding\.sample_sequences"):
        fit(ids, z, ShardingConfig(), GRID, 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(0, 40), st.floats(1.0, 3.0), st.integers(0, 2**32 - 1))
def test_no_cluster_is_above_its_capacity_or_empty(clusters: int, more: int, capacity: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    distances = generator.exponential(size=(clusters + more, clusters)) * np.geomspace(1, 50, clusters)
    labels = capped_assignment(distances, capacity)
    sizes = np.bincount(labels, minlength=clusters)
    assert sizes.max() <= math.ceil(capacity * len(distances) / clusters)
    assert sizes.min() >= 1
    assert np.array_equal(labels, capped_assignment(distances, capacity))


def test_those_who_lose_most_by_their_second_choice_keep_their_first() -> None:
    distances = np.array([[0.0, 1.0], [0.0, 5.0], [0.0, 3.0], [4.0, 9.0]])
    assert capped_assignment(distances, 1.0).tolist() == [1, 0, 1, 0]


def test_a_row_whose_listed_choices_are_full_takes_the_emptiest() -> None:
    choices, distances = np.zeros((6, 1), np.int64), np.arange(6.0)[:, None]
    assert np.bincount(capped_choices(choices, distances, 3, 1.0)).tolist() == [2, 2, 2]


def test_an_empty_cluster_that_nobody_lists_gets_a_row_of_a_fuller_one() -> None:
    choices, distances = np.array([[1], [0], [0], [0]]), np.zeros((4, 1))
    labels = capped_choices(choices, distances, 3, 3.0)
    assert np.bincount(labels, minlength=3).min() == 1
    assert labels[0] == 1
