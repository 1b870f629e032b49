"""The outer step of one module as arithmetic on flat float32 chunks: weights, weighted sum, Nesterov.

Legend: C elements of a chunk. The outer gradient is start minus end: the parameters a task started from minus those it
ended with, so that it points uphill like any gradient and the step subtracts it. DiLoCo (2311.08105) Alg 1 and DiPaCo
(2403.10616) Alg 1 line 13, each module with a momentum of its own; weights are Eq 2-3 there, Sec 2.7.
Every operation is elementwise in float32, so neither the chunk size nor a restart changes a bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

Chunk = npt.NDArray[np.float32]


class NoContributions(ValueError):
    """An outer step over nothing, or over shards without a token."""


def contribution_weights(tokens: Sequence[int]) -> tuple[float, ...]:
    """The weight of each contribution to one module: its shard's training tokens over those of all of them.

    Normalised over the contributions to that module (DiPaCo Eq 2-3 with the sum over the module's own paths), so that
    the weighted sum stays a mean. Raises NoContributions.
    """
    total = sum(tokens)
    if not tokens or min(tokens) < 0 or total == 0:
        raise NoContributions(
            f"the shards of a module hold {list(tokens)} training tokens; at least one must hold some"
        )
    return tuple(count / total for count in tokens)


def gradient_scale(num_contributions: int, rescale: Literal["none", "sqrt"]) -> float:
    """What the averaged outer gradient is multiplied with: sqrt(contributions) where configured (DiPaCo Sec 2.7).

    An average over n outer gradients shrinks like 1/sqrt(n) (DiLoCo, appendix), so the factor evens modules out.
    """
    if num_contributions < 1:
        raise NoContributions(f"a module steps on at least 1 contribution, not {num_contributions}")
    return math.sqrt(num_contributions) if rescale == "sqrt" else 1.0


def add_weighted(total: Chunk | None, outer_gradient: Chunk, weight: float) -> Chunk:
    """`total + weight * outer_gradient`, (C); `total` is None before the first contribution.

    Float addition is not associative: call it in shard order, whatever the order of arrival.
    """
    weighted = outer_gradient * np.float32(weight)
    return weighted if total is None else total + weighted


def nesterov_step(
    params: Chunk, momentum: Chunk | None, outer_gradient: Chunk, learning_rate: float, mu: float
) -> tuple[Chunk, Chunk]:
    """New parameters and new momentum, both (C): `b = mu*b + g`, then `params -= lr*(g + mu*b)`.

    torch.optim.SGD(nesterov=True, momentum=mu, lr=learning_rate) with the outer gradient as `.grad`; `momentum` is None
    at version 0, which equals a buffer of zeros.
    """
    buffer: Chunk = outer_gradient if momentum is None else momentum * np.float32(mu) + outer_gradient
    step: Chunk = outer_gradient + buffer * np.float32(mu)
    return params - step * np.float32(learning_rate), buffer


def squared_norm(chunk: Chunk) -> float:
    """The sum of squares in float64."""
    return float(np.sum(np.square(chunk, dtype=np.float64)))
