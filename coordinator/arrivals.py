"""How long a silence may last: deadlines from measured arrivals instead of a time-out that a person must guess.

Pure. The estimate is TCP's (RFC 6298): a smoothed mean of the gaps plus four times their smoothed deviation.
"""

from __future__ import annotations

from dataclasses import dataclass

MIN_ARRIVALS = 5
MEAN_WEIGHT, DEVIATION_WEIGHT = 1 / 8, 1 / 4


@dataclass(slots=True)
class Gaps:
    """Gaps between arrivals of one kind, seconds."""

    mean_s: float = 0.0
    deviation_s: float = 0.0
    count: int = 0

    def observe(self, gap_s: float) -> None:
        """One more gap."""
        if self.count == 0:
            self.mean_s, self.deviation_s = gap_s, gap_s / 2
        else:
            self.deviation_s += DEVIATION_WEIGHT * (abs(gap_s - self.mean_s) - self.deviation_s)
            self.mean_s += MEAN_WEIGHT * (gap_s - self.mean_s)
        self.count += 1

    def patience_s(self, at_least_s: float, at_most_s: float) -> float:
        """How long to wait for the next arrival; `at_most_s` while fewer than five gaps were seen."""
        if self.count < MIN_ARRIVALS:
            return at_most_s
        return min(at_most_s, max(at_least_s, self.mean_s + 4 * self.deviation_s))
