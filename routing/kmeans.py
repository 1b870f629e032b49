"""Fitting cluster centres: transform, k-means++ and, where shards have a capacity, balanced k-means on top.

Seeded, float64, one thread, rows sorted by id: the same sample gives the same centres. Fit and assignment see the
features of exactly the same prefix.

Legend: N sequences, D features, E transformed features, K clusters.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Float64, Int64, UInt64

from configs.schema import ShardingConfig
from model.topology import Topology
from routing.arrangement import arrange
from routing.clusters import Clusters, Group, squared_distances
from routing.transform import fit_transform

MINIBATCH_ABOVE = 200_000
RESTARTS = 8
BALANCED_ROUNDS = 25


class CannotFit(ValueError):
    """A sample or a topology that no router can be fitted to."""


def fit(
    ids: UInt64[np.ndarray, " N"], z: npt.NDArray[Any], config: ShardingConfig, topology: Topology, seed: int
) -> Clusters:
    """A router for `topology` from a sample of features (N, D); raises CannotFit."""
    import sklearn.cluster  # noqa: F401  the limit reaches only thread pools that are loaded
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1):
        return _fit(ids, z, config, topology, seed)


def _fit(
    ids: UInt64[np.ndarray, " N"], z: npt.NDArray[Any], config: ShardingConfig, topology: Topology, seed: int
) -> Clusters:
    rows = np.asarray(z, np.float64)[np.argsort(ids, kind="stable")]
    if not np.isfinite(rows).all():
        raise CannotFit("features hold values that are not finite; the base has diverged: lower inner.learning_rate")
    sizes = _cluster_counts(config, topology)
    needed = max(sizes) * 2
    if len(rows) < needed:
        raise CannotFit(
            f"a sample of {len(rows)} sequences is too small for {math.prod(sizes)} shards (at least {needed}); "
            "raise sharding.sample_sequences or give more documents"
        )
    mean, matrix = fit_transform(rows, config.transform)
    transformed = (rows - mean) @ matrix
    groups = []
    for index, clusters in enumerate(sizes):
        dimensions = _dimensions(config, transformed.shape[1], index, len(sizes))
        centres = _centres(transformed[:, dimensions], clusters, config.capacity, seed + index)
        groups.append(Group(dimensions, centres))
    if config.kind == "kmeans" and topology.num_paths > 1 and topology.replicas == 1:
        only = groups[0]
        groups = [Group(only.dimensions, only.centres[arrange(only.centres, topology)])]
    return Clusters(mean, matrix, tuple(groups), topology.replicas, config.prefix_tokens)


def _cluster_counts(config: ShardingConfig, topology: Topology) -> list[int]:
    """Clusters of each group: one group of all shards, or one group a level that offers a choice."""
    if config.kind == "kmeans":
        return [topology.num_shards]
    if topology.replicas > 1:
        raise CannotFit("sharding.kind 'product-kmeans' gives one shard a path; set topology.replicas to 1")
    choices = [level.num_modules for level in topology.levels if not level.per_path and level.num_modules > 1]
    return choices or [1]


def _dimensions(config: ShardingConfig, size: int, index: int, groups: int) -> Int64[np.ndarray, " G"]:
    """Contiguous parts of raw features (DiPaCo Sec 7.3), interleaved ones of principal components.

    Components are sorted by variance: contiguous parts would leave the last group with noise.
    """
    every = np.arange(size)
    return every[index::groups] if config.transform == "whiten" else np.array_split(every, groups)[index]


def _centres(
    rows: Float64[np.ndarray, "N G"], clusters: int, capacity: float | None, seed: int
) -> Float64[np.ndarray, "K G"]:
    """k-means centres; with a capacity, rounds of capped assignment and mean until they stand still."""
    from sklearn.cluster import KMeans, MiniBatchKMeans

    kind = MiniBatchKMeans if len(rows) > MINIBATCH_ABOVE else KMeans
    fitted = kind(clusters, n_init=RESTARTS, random_state=seed % 2**32).fit(rows)
    centres: npt.NDArray[np.float64] = fitted.cluster_centers_
    if capacity is None:
        return centres
    labels = None
    for _ in range(BALANCED_ROUNDS):
        capped = capped_assignment(squared_distances(rows, centres), capacity)
        if labels is not None and np.array_equal(capped, labels):
            break
        labels = capped
        centres = np.stack([rows[labels == cluster].mean(axis=0) for cluster in range(clusters)])
    return centres


def capped_assignment(distances: npt.NDArray[np.float64], capacity: float) -> Int64[np.ndarray, " N"]:
    """The cluster of every row, none above `capacity` times its fair share, none empty; deterministic.

    Rows that lose most by their second choice come first (regret order); each takes the nearest cluster with room.
    """
    choices = np.argsort(distances, axis=1, kind="stable")
    return capped_choices(choices, np.take_along_axis(distances, choices, axis=1), distances.shape[1], capacity)


def capped_choices(
    choices: npt.NDArray[Any], distances: npt.NDArray[Any], clusters: int, capacity: float
) -> Int64[np.ndarray, " N"]:
    """The same from ranked choices (N, n) and their distances; a row whose choices are all full takes the emptiest.

    A choice at an infinite distance is none, but every row has one at a finite distance.
    """
    count = len(choices)
    limit = math.ceil(capacity * count / clusters)
    regret = distances[:, 1] - distances[:, 0] if choices.shape[1] > 1 else np.zeros(count)
    room = np.full(clusters, limit)
    labels = np.full(count, -1, np.int64)
    for row in np.argsort(-regret, kind="stable"):
        listed = choices[row][distances[row] < math.inf]
        cluster = next((int(choice) for choice in listed if room[choice]), int(room.argmax()))
        labels[row] = cluster
        room[cluster] -= 1
    _fill_empty(labels, choices, distances, clusters)
    return labels


def _fill_empty(
    labels: npt.NDArray[np.int64], choices: npt.NDArray[Any], distances: npt.NDArray[Any], clusters: int
) -> None:
    """Give every empty cluster the row that ranks it best (else the first), from a cluster that keeps others."""
    sizes = np.bincount(labels, minlength=clusters)
    for cluster in np.flatnonzero(sizes == 0):
        spare = np.flatnonzero(sizes[labels] > 1)
        if not spare.size:
            return
        cost = np.where(choices[spare] == cluster, distances[spare], np.inf).min(axis=1)
        row = int(spare[cost.argmin()])
        sizes[labels[row]] -= 1
        labels[row] = cluster
        sizes[cluster] += 1
