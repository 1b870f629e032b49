"""How long workers hold leases before they are lost: what the interval between checkpoints follows from. Pure.

Counted while a decision is made, into the run's standing, which is stored with the next completed task, so that it
outlives the coordinator; what comes of a decision that could not be stored is taken back.
"""

from __future__ import annotations

from dataclasses import replace

from coordinator.state import Lifeline, State

# Before anything is known: as if one worker had been lost after so long.
PRIOR_S = 60.0


class Losses:
    """Seconds that leases were held, and how many of them ended because their worker vanished or had to go."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._unsettled = 0

    def kept(self, lifeline: Lifeline, now: float) -> None:
        """A lease ended in peace."""
        self._count(now - lifeline.began_s, 0)

    def lost(self, lifeline: Lifeline) -> None:
        """A lease ended with its worker, which was last heard of some time ago."""
        self._count(lifeline.heard_s - lifeline.began_s, 1)

    def mtbf_s(self) -> float:
        """Mean time between failures, as far as leases tell."""
        standing = self._state.standing
        return (standing.held_s + PRIOR_S) / (standing.leases_lost + 1)

    def settle(self) -> None:
        """The decision that ended leases is stored."""
        self._unsettled = 0

    def take_back(self) -> None:
        """It could not be: no lease was lost by it. How long they were held stays, since they begin anew from now."""
        standing = self._state.standing
        self._state.standing = replace(standing, leases_lost=standing.leases_lost - self._unsettled)
        self._unsettled = 0

    def _count(self, held_s: float, lost: int) -> None:
        standing, self._unsettled = self._state.standing, self._unsettled + lost
        self._state.standing = replace(
            standing, held_s=standing.held_s + max(0.0, held_s), leases_lost=standing.leases_lost + lost
        )
