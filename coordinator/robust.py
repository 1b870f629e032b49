"""Averages of outer gradients that a minority of wrong ones cannot move far: coordinate-wise median and trimmed mean.

Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates" (1803.01498), Definitions 1
and 2, with weights: a contribution of weight w counts at every coordinate like w equal ones. So of n equal weights a
trim share of k/n leaves out exactly the k smallest and the k largest values, as there, and where the cut falls inside a
contribution its remaining weight counts. Up to the trim share of the weight (median: up to half) may be arbitrary; what
is then left lies, at every coordinate, within the range of the honest values. Where shards hold different data the
average leans towards what most of them agree on, which is no longer the gradient of their mean loss.

Legend: N contributions, C elements of a chunk. Chunks come in shard order, and equal values keep it: the order of
arrival changes no bit. Sums are taken in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from configs.schema import OuterConfig
from coordinator.outer import Chunk

Average = Callable[[npt.NDArray[np.float32], Sequence[float]], Chunk]

# Below this many contributions no majority tells right from wrong: they are averaged as a mean.
MIN_CONTRIBUTIONS = 3
# Sums of weights within this of one half count as one half.
_TIE = 1e-9


def robust_average(outer: OuterConfig, num_contributions: int) -> Average | None:
    """The configured average of so many contributions; None where it is the weighted mean."""
    if num_contributions < MIN_CONTRIBUTIONS or outer.average == "mean":
        return None
    return weighted_median if outer.average == "median" else partial(weighted_trimmed_mean, trim_share=outer.trim_share)


def weighted_median(chunks: npt.NDArray[np.float32], weights: Sequence[float]) -> Chunk:
    """(N, C) to (C): the smallest value with at least half of the weight up to it.

    Where that is exactly half, the mean of it and the next: with equal weights the median as it is usually defined.
    """
    values, _, cumulative = _sorted(chunks, weights)
    lower = np.argmax(cumulative >= 0.5 - _TIE, axis=0)[np.newaxis]
    upper = np.argmax(cumulative > 0.5 + _TIE, axis=0)[np.newaxis]
    halves = (np.take_along_axis(values, each, axis=0)[0].astype(np.float64) for each in (lower, upper))
    return _as_chunk(sum(halves) / 2.0)


def weighted_trimmed_mean(chunks: npt.NDArray[np.float32], weights: Sequence[float], trim_share: float) -> Chunk:
    """(N, C) to (C): the weighted mean without `trim_share` of the weight at either end of the sorted values."""
    values, sorted_weights, cumulative = _sorted(chunks, weights)
    upper = np.minimum(cumulative, 1.0 - trim_share)
    lower = np.maximum(cumulative - sorted_weights, trim_share)
    kept = np.maximum(upper - lower, 0.0)
    total = np.zeros(values.shape[1])
    for value, weight in zip(values, kept, strict=True):  # one after the other: a sum over an axis may be regrouped
        total += np.where(weight > 0.0, value.astype(np.float64) * weight, 0.0)
    return _as_chunk(total / kept.sum(axis=0))


def _sorted(
    chunks: npt.NDArray[np.float32], weights: Sequence[float]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Values ascending at every coordinate, their weights, and the weights summed up to each of them, all (N, C)."""
    order = np.argsort(chunks, axis=0, kind="stable")
    sorted_weights = np.asarray(weights, np.float64)[order]
    return np.take_along_axis(chunks, order, axis=0), sorted_weights, np.cumsum(sorted_weights, axis=0)


def _as_chunk(values: npt.NDArray[np.float64]) -> Chunk:
    chunk: Chunk = values.astype(np.float32)
    return chunk
