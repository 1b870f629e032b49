"""Whether rounding may have decided a token: the top two scores, or the sampling threshold and an edge, close together.

Legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
from jaxtyping import Float

from dipaco.examples import Desk, Wish
from inference.sampling import Sampler, Sampling, probabilities

NEAR = 1e-3


def margin(logits: Float[np.ndarray, " V"], sampling: Sampling, point: float) -> float:
    """How far the choice was from another one: in logits where it is greedy, else in probability."""
    if sampling.temperature == 0:
        top = np.sort(np.partition(logits, -2)[-2:])
        return float(top[1] - top[0])
    edges = np.cumsum(probabilities(logits, sampling))
    return float(np.abs(edges / edges[-1] - point).min())


@dataclass
class Watched:
    """The margins of the choices of a text, in order."""

    margins: list[float] = field(default_factory=list)


@contextmanager
def watched() -> Iterator[Watched]:
    """Texts that engines begin while this is entered tell their margins."""
    found = Watched()

    class Watching(Sampler):
        def __init__(self, sampling: Sampling) -> None:
            super().__init__(sampling)
            self._points = np.random.Generator(np.random.Philox(key=sampling.seed))

        def choose(self, logits: Float[np.ndarray, " V"]) -> int:
            found.margins.append(margin(logits, self._sampling, self._points.random()))
            return super().choose(logits)

    with mock.patch("inference.engine.Sampler", Watching):
        yield found


def excused(desk: Desk, prompt: str, wish: Wish, other: str) -> bool:
    """Whether another text of the same request may differ from the one written alone: a near-tie came first."""
    with watched() as found:
        writing = desk.write(prompt, wish)
        lengths = []
        for _ in writing:
            lengths.append(len(writing.text))
    alone = writing.text
    same = next((place for place, pair in enumerate(zip(alone, other, strict=False)) if pair[0] != pair[1]), None)
    reached = min(len(alone), len(other)) if same is None else same
    deciding = next((place for place, length in enumerate(lengths) if length > reached), len(lengths) - 1)
    return any(each < NEAR for each in found.margins[: deciding + 1])
