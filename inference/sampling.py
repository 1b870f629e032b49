"""Choosing the next token from logits: greedy, or temperature with top-k and top-p; the same seed, the same tokens.

Legend: V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64


class BadSampling(ValueError):
    """Sampling settings outside their range."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """`temperature` 0 is greedy; `top_k` keeps the k likeliest tokens, `top_p` the fewest of that mass together."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise BadSampling(f"temperature is {self.temperature}, expected at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise BadSampling(f"top_k is {self.top_k}, expected at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise BadSampling(f"top_p is {self.top_p}, expected above 0 and at most 1")


def probabilities(logits: Float[np.ndarray, " V"], sampling: Sampling) -> Float64[np.ndarray, " V"]:
    """The distribution that is drawn from; ties at the edge of top-k and top-p go to the lower token ids."""
    if sampling.temperature == 0:
        greedy = np.zeros(len(logits))
        greedy[int(np.argmax(logits))] = 1.0
        return greedy
    scores = logits.astype(np.float64)
    weights = np.exp((scores - scores.max()) / sampling.temperature)
    order = np.argsort(-scores, kind="stable")[: sampling.top_k]
    if sampling.top_p is not None:
        shares = np.cumsum(weights[order]) / weights[order].sum()
        order = order[: int(np.searchsorted(shares, sampling.top_p)) + 1]
    kept = np.zeros(len(logits))
    kept[order] = weights[order]
    normalised: np.ndarray = kept / kept.sum()
    return normalised


class Sampler:
    """Draws the tokens of one generation."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._generator = np.random.Generator(np.random.Philox(key=sampling.seed))

    def choose(self, logits: Float[np.ndarray, " V"]) -> int:
        """One token id; takes one number from the generator whatever the settings, so that runs stay comparable."""
        point = self._generator.random()
        if self._sampling.temperature == 0:
            return int(np.argmax(logits))
        cumulative = np.cumsum(probabilities(logits, self._sampling))
        token = int(np.searchsorted(cumulative, point * cumulative[-1], side="right"))
        return min(token, len(cumulative) - 1)
