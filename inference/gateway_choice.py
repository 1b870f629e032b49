"""Which path answers: the best by the router's posterior among those whose backends can, and what a failure changes.

No clock and no socket: `now_s` (monotonic seconds) is an argument, failures are told.

Legend: P paths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

LONGEST_REST_S = 60.0
TOO_MANY = 429
# What says that gateway and backend do not fit (key, model, place), not that the client's request is wrong.
_MISFIT = (401, 403, 404, 405, 407, 408)

FailureKind = Literal["unreachable", "silent", "status", "broken"]


class NoBackend(LookupError):
    """No backend may be asked; one may after `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a backend did not answer. `retry_after_s`: what it asked for itself."""

    kind: FailureKind
    why: str
    status: int | None = None
    retry_after_s: float | None = None

    @property
    def busy(self) -> bool:
        return self.status == TOO_MANY


def verdict(status: int, retry_after: str | None = None) -> Failure | None:
    """The failure that a backend's HTTP status is, None where the answer is the client's, mistakes of it included."""
    if status < 300 or (400 <= status < 500 and status != TOO_MANY and status not in _MISFIT):
        return None
    seconds = float(retry_after) if retry_after and retry_after.strip().isdecimal() else None
    return Failure("status", f"answered {status}", status, seconds)


def probe_verdict(status: int) -> Failure | None:
    """The failure that the status of a listing of models is; a server without such a list is up all the same."""
    refused = status in (401, 403, 407)
    return Failure("status", f"answered {status} to a look at its models", status) if refused or status >= 500 else None


@dataclass(slots=True)
class _Standing:
    """One backend. `reachable`: False from a lost connection until a probe or a request succeeds."""

    reachable: bool = True
    busy: bool = False
    failures: int = 0
    rests_until_s: float = float("-inf")


class Choice:
    """The standing of every backend, `served` saying which paths have one; `cool_down_s` is the first rest."""

    def __init__(self, served: Sequence[bool], cool_down_s: float) -> None:
        self._served, self._cool_down_s = tuple(served), cool_down_s
        self._standing = [_Standing() for _ in served]

    def served(self, path_index: int) -> bool:
        return self._served[path_index]

    def up(self, path_index: int, now_s: float) -> bool:
        """Whether its backend is among those that are asked."""
        standing = self._standing[path_index]
        return self._served[path_index] and standing.reachable and now_s >= standing.rests_until_s

    def order(self, posterior: Float[np.ndarray, " P"], now_s: float) -> list[int]:
        """Paths in the order in which they are asked: by posterior, ties by index.

        Where no backend is up, all that are not too busy are tried, as they may be back. Raises NoBackend.
        """
        ranked = [int(path) for path in np.argsort(-posterior, kind="stable") if self._served[path]]
        for usable in (self.up, self._not_busy):
            found = [path for path in ranked if usable(path, now_s)]
            if found:
                return found
        soonest_s = min((self._standing[path].rests_until_s for path in ranked), default=now_s) - now_s
        raise NoBackend("the backends of all paths have too much to do", max(0.0, soonest_s))

    def failed(self, path_index: int, failure: Failure, now_s: float) -> None:
        """A request failed: the backend rests, twice as long as the time before."""
        standing = self._standing[path_index]
        rest_s = failure.retry_after_s
        if rest_s is None:
            rest_s = self._cool_down_s * 2.0 ** min(standing.failures, 16)
        standing.failures += 1
        standing.busy = failure.busy
        standing.rests_until_s = now_s + min(rest_s, LONGEST_REST_S)
        if failure.kind == "unreachable":
            standing.reachable = False

    def answered(self, path_index: int) -> None:
        """A request was answered: nothing speaks against the backend."""
        self._standing[path_index] = _Standing()

    def probed(self, path_index: int, failure: Failure | None) -> None:
        """A look at the backend: one that is back after it could not be reached is asked at once.

        A rest after a failed answer goes on: to list models is not to write text.
        """
        standing = self._standing[path_index]
        if failure is not None:
            standing.reachable = False
        elif not standing.reachable:
            self._standing[path_index] = _Standing()

    def _not_busy(self, path_index: int, now_s: float) -> bool:
        standing = self._standing[path_index]
        return not standing.busy or now_s >= standing.rests_until_s
