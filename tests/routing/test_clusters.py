"""Distances, paths and posteriors of frozen centres, against sums written out here."""

from __future__ import annotations

import msgpack
import numpy as np
import pytest

from routing.clusters import Clusters, Group, squared_distances
from routing.records import MalformedRecord

NOISE = np.random.default_rng(0)


def product_clusters(replicas: int = 1, prefix_tokens: int = 32) -> Clusters:
    """2 x 3 centres over interleaved dimensions of a linear transform."""
    return Clusters(
        NOISE.normal(size=5),
        NOISE.normal(size=(5, 4)),
        (
            Group(np.array([0, 2]), NOISE.normal(size=(2, 2))),
            Group(np.array([1, 3]), NOISE.normal(size=(3, 2))),
        ),
        replicas,
        prefix_tokens,
    )


def test_a_shard_of_product_clusters_is_a_choice_in_every_group_row_major() -> None:
    clusters = product_clusters()
    z = NOISE.normal(size=(7, 5)).astype(np.float32)
    found = clusters.distances(z)
    assert found.shape == (7, 6)
    for row, features in enumerate(z):
        x = (features.astype(np.float64) - clusters.mean) @ clusters.matrix
        for first in range(2):
            for second in range(3):
                expected = ((x[[0, 2]] - clusters.groups[0].centres[first]) ** 2).sum()
                expected += ((x[[1, 3]] - clusters.groups[1].centres[second]) ** 2).sum()
                assert found[row, first * 3 + second] == pytest.approx(expected)


def test_the_nearest_come_in_order_and_ties_go_to_the_lower_index() -> None:
    line = Clusters(np.zeros(1), np.eye(1), (Group(np.array([0]), np.array([[1.0], [-1.0], [3.0]])),), 1, 32)
    shards, distances = line.nearest(np.array([[0.0], [2.5]]), 2)
    assert shards.tolist() == [[0, 1], [2, 0]]
    assert distances.tolist() == [[1.0, 1.0], [0.25, 2.25]]
    alike = Clusters(np.zeros(1), np.eye(1), (Group(np.array([0]), np.tile([[1.0], [2.0]], (50, 1))),), 1, 32)
    assert alike.nearest(np.array([[0.0]]), 100)[0][0].tolist() == [*range(0, 100, 2), *range(1, 100, 2)]


def test_a_posterior_sums_the_shards_of_a_path_and_peaks_where_its_shards_are_near() -> None:
    clusters = product_clusters(replicas=2)
    z = NOISE.normal(size=(9, 5))
    posterior = clusters.posterior(z)
    weights = np.exp(-0.5 * clusters.distances(z))
    weights /= weights.sum(axis=1, keepdims=True)
    assert clusters.num_paths == 3
    assert posterior == pytest.approx(weights[:, 0::2] + weights[:, 1::2])
    assert clusters.paths(z).tolist() == (clusters.distances(z).argmin(axis=1) // 2).tolist()


def test_far_features_still_have_a_posterior() -> None:
    posterior = product_clusters().posterior(np.full((1, 5), 1e6))
    assert np.isfinite(posterior).all()
    assert posterior.sum() == pytest.approx(1.0)


def test_a_row_is_routed_alike_alone_and_among_others() -> None:
    clusters = product_clusters()
    z = NOISE.normal(size=(200, 5))
    together, distances = clusters.paths(z), clusters.distances(z)
    assert [int(clusters.paths(row[None])[0]) for row in z] == together.tolist()
    for row, expected in zip(z, distances, strict=True):
        assert clusters.distances(row[None])[0] == pytest.approx(expected, rel=1e-12)
    centres = NOISE.normal(size=(3, 5))
    alone = np.concatenate([squared_distances(row[None], centres) for row in z])
    assert np.array_equal(alone, squared_distances(z, centres))


def test_the_frozen_form_returns_and_names_the_version() -> None:
    clusters = product_clusters(replicas=3, prefix_tokens=16)
    again = Clusters.from_bytes(clusters.to_bytes())
    assert (again.replicas, again.num_paths, again.prefix_tokens) == (3, 2, 16)
    z = NOISE.normal(size=(20, 5))
    assert np.array_equal(again.distances(z), clusters.distances(z))
    assert again.version == clusters.version
    moved = Clusters(clusters.mean + 1e-9, clusters.matrix, clusters.groups, 3, 16)
    assert moved.version != clusters.version


@pytest.mark.parametrize(
    "change",
    [{"kind": "gater"}, {"mean": b"odd"}, {"matrix": b""}, {"groups": 3}, {"groups": []}, {"replicas": "two"}],
)
def test_a_router_that_is_something_else_is_refused(change: dict[str, object]) -> None:
    record = msgpack.unpackb(product_clusters().to_bytes()) | change
    with pytest.raises(MalformedRecord):
        Clusters.from_bytes(msgpack.packb(record))


@pytest.mark.parametrize(
    "data", [b"", b"\xc1", msgpack.packb(3), msgpack.packb({}), product_clusters().to_bytes()[:-9]]
)
def test_noise_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedRecord):
        Clusters.from_bytes(data)


def test_centres_of_dimensions_that_the_transform_lacks_are_refused() -> None:
    group = {"dimensions": np.array([9]).tobytes(), "centres": np.zeros((2, 1)).tobytes()}
    record = msgpack.unpackb(product_clusters().to_bytes()) | {"groups": [group]}
    with pytest.raises(MalformedRecord, match="dimension"):
        Clusters.from_bytes(msgpack.packb(record))
