"""How often partial progress is worth its cost: from what the latest checkpoint took. Pure; times in seconds."""

from __future__ import annotations

# Of the time of a task that making checkpoints may take away from its steps, and that one may be on the wire.
COST_SHARE, WIRE_SHARE = 0.05, 0.2


class Pace:
    """Due once so much time has passed since the latest checkpoint that this one costs its share of it at most.

    Before any cost is measured the first is due after `first_s`; no two are closer than `least_s`.
    """

    def __init__(self, first_s: float, least_s: float) -> None:
        self.interval_s = first_s
        self._least_s = least_s

    def is_due(self, since_s: float) -> bool:
        """Whether `since_s` seconds of steps without a checkpoint are enough."""
        return since_s >= self.interval_s

    def took(self, cost_s: float, wire_s: float) -> None:
        """A checkpoint took `cost_s` of computing away, and `wire_s` passed from its start to the answer."""
        self.interval_s = max(self._least_s, cost_s / COST_SHARE, wire_s / WIRE_SHARE)
