"""Whether an outer gradient is about as long as recent ones: per module, against the median of a bounded window.

A factor up and the same factor down are equally far, and a minority of wrong norms does not move the median. Honest
outer gradients grow while the learning rate warms up and shrink as it decays, so the window is short and the factor
wide: over 24 phases of configs/quickstart.yaml they stay within a third and once the median of even the 16 before them.
The spread of the window is no measure here: what it measures most is that drift.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping

# Norms kept of each module, and how many there must be before one is judged.
WINDOW = MIN_NORMS = 8
# What a norm of zero counts as: far below any other.
_LEAST = 1e-30


class Norms:
    """The recent L2 norms of contributions that count, by model and module."""

    def __init__(self, factor: float | None) -> None:
        """`factor`: how many times longer or shorter than the median is still believed; None believes everything."""
        self._factor = factor
        self._recent: dict[tuple[str, str], deque[float]] = {}

    def learn(self, model: str, norms: Mapping[str, float]) -> None:
        """The contributions of a task count."""
        for module_id, norm in norms.items():
            self._recent.setdefault((model, module_id), deque(maxlen=WINDOW)).append(norm)

    def doubt(self, model: str, norms: Mapping[str, float]) -> str:
        """Why contributions with these norms are not believed, in one clause; empty where they are."""
        found = (self._doubt(model, module_id, norm) for module_id, norm in sorted(norms.items()))
        return next((reason for reason in found if reason), "")

    def _doubt(self, model: str, module_id: str, norm: float) -> str:
        recent = self._recent.get((model, module_id), ())
        if self._factor is None or len(recent) < MIN_NORMS:
            return ""
        middle = statistics.median(_log(each) for each in recent)
        if abs(_log(norm) - middle) <= math.log(self._factor):
            return ""
        return f"the outer gradient of module {module_id} has norm {norm:.3g}, recent ones {math.exp(middle):.3g}"


def _log(norm: float) -> float:
    return math.log(max(norm, _LEAST))
