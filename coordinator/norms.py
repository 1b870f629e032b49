"""Whether an outer gradient is about as long as recent ones: per module, against the median of a bounded window.

Judged on a log scale, where a factor up and the same factor down are equally far, with the median and the median
absolute deviation, which a minority of wrong norms does not move. Honest outer gradients grow while the learning rate
warms up and shrink as it decays: the window is short, and the factor that is still believed is wide.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping

# Norms kept of each module; how many there must be before one is judged.
WINDOW, MIN_NORMS = 16, 8
# A norm this many robust standard deviations from the median is believed, where that is more than the factor.
DEVIATIONS = 6.0
# The median absolute deviation of a normal distribution, in standard deviations, is 1 / 1.4826.
_NORMAL = 1.4826
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
        logs = [_log(each) for each in recent]
        middle = statistics.median(logs)
        deviation = _NORMAL * statistics.median(abs(each - middle) for each in logs)
        if abs(_log(norm) - middle) <= max(math.log(self._factor), DEVIATIONS * deviation):
            return ""
        return f"the outer gradient of module {module_id} has norm {norm:.3g}, recent ones {math.exp(middle):.3g}"


def _log(norm: float) -> float:
    return math.log(max(norm, _LEAST))
