"""Which cluster takes which place in the grid: clusters whose paths share a module should be alike.

k-means numbers its clusters arbitrarily, while a module is trained by all shards of a row, or a column, of the grid. A
quadratic assignment (Koopmans and Beckmann 1957): solved by trying everything where the grid is small, by swaps beyond.

Legend: K clusters (and places, one a path), G dimensions, R orders.
"""

from __future__ import annotations

from itertools import permutations

import numpy as np
import numpy.typing as npt
from jaxtyping import Float64, Int64

from model.topology import Topology
from routing.clusters import squared_distances

EXHAUSTIVE_UP_TO = 6
STARTS = 4
# Gains below this share of the whole cost are rounding.
_TINY = 1e-10


def arrange(centres: Float64[np.ndarray, "K G"], topology: Topology) -> Int64[np.ndarray, " K"]:
    """The order in which centres take the paths 0 .. K - 1: path p gets `centres[order[p]]`.

    Minimises `arrangement_cost`: the best order up to 6 clusters, one that no swap of two betters above. Where nothing
    is shared, or no order is better, the order that there is. Deterministic.
    """
    assert len(centres) == topology.num_paths, f"{len(centres)} centres for {topology.num_paths} paths"
    shared, distances = shared_modules(topology), squared_distances(centres, centres)
    if len(centres) <= EXHAUSTIVE_UP_TO:
        orders = np.array(list(permutations(range(len(centres)))))
    else:
        generator = np.random.Generator(np.random.Philox(key=0))
        starts = [np.arange(len(centres)), *(generator.permutation(len(centres)) for _ in range(STARTS - 1))]
        orders = np.stack([_swapped(order, shared, distances) for order in starts])
    costs = np.array([arrangement_cost(order, shared, distances) for order in orders])
    best: npt.NDArray[np.int64] = orders[np.flatnonzero(costs <= costs.min() * (1 + _TINY))[0]]
    return best


def shared_modules(topology: Topology) -> Float64[np.ndarray, "K K"]:
    """How many modules two paths share, over the levels that offer a choice; 0 on the diagonal."""
    picks = np.array([topology.module_indices(path) for path in range(topology.num_paths)])  # (K, levels)
    offers = np.array([level.num_modules > 1 for level in topology.levels])
    same = (picks[:, None] == picks[None])[:, :, offers]  # (K, K, levels that offer a choice)
    shared: npt.NDArray[np.float64] = same.sum(axis=2).astype(np.float64)
    np.fill_diagonal(shared, 0.0)
    return shared


def arrangement_cost(
    order: npt.NDArray[np.int64], shared: Float64[np.ndarray, "K K"], distances: Float64[np.ndarray, "K K"]
) -> float:
    """Sum over modules of the squared distances between all pairs of centres whose paths share the module."""
    return float((shared * distances[np.ix_(order, order)]).sum()) / 2


def _swapped(
    order: npt.NDArray[np.int64], shared: Float64[np.ndarray, "K K"], distances: Float64[np.ndarray, "K K"]
) -> Int64[np.ndarray, " K"]:
    """`order` after the swap that gains most, again and again until none gains."""
    order, least = order.copy(), -_TINY * float(shared.sum() * distances.mean())
    while True:
        change = _changes(shared, distances[np.ix_(order, order)])
        first, second = np.unravel_index(change.argmin(), change.shape)
        if change[first, second] >= least:
            return order
        order[[first, second]] = order[[second, first]]


def _changes(shared: Float64[np.ndarray, "K K"], placed: Float64[np.ndarray, "K K"]) -> Float64[np.ndarray, "K K"]:
    """What swapping two places does to the cost: sum over k of (shared[r, k] - shared[s, k]) * (d[s, k] - d[r, k]).

    k runs over all places but r and s (Burkard and Rendl 1984, Eq 2.1, for symmetric matrices).
    """
    mixed = shared @ placed  # (K, K): place r with what place s holds
    kept = np.diag(mixed)
    changes: npt.NDArray[np.float64] = mixed + mixed.T - kept[:, None] - kept[None, :] + 2 * shared * placed
    return changes
