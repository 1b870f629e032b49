"""Which of the claims of a task counts. Pure.

Inside one fingerprint class results agree when all their bits do, across classes when the norms of their contributions
and their losses differ by at most NORM_TOLERANCE, and their inner states are about as long: that says nothing of
directions. Of an outlier the first result that is none counts, or what two workers agree on; of an audited task what
two agree on, and whoever differs from two others is banned. Where two workers differ neither settles it by computing
the task once more. Liars that agree with one another win against one honest worker: audits assume that of any three
workers two are honest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coordinator.state import Claim, Task
from protocol.tasks import TaskResult

# Across fingerprint classes: how far norms may differ, as a share of the larger.
NORM_TOLERANCE = 0.05
# The same for the inner state (moments), which drifts more than the sum of all steps does.
INNER_STATE_TOLERANCE = 0.5
# A task with so many different results says something about the machines, not about one of them.
MAX_CLAIMS = 5
_INNER_STATE = "inner_state"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which claim counts (None: not decided yet), and what that means for those who made the others.

    `note` is for a person; with `paused` the run stops for that reason.
    """

    claims: tuple[Claim, ...]
    counted: Claim | None = None
    suspects: tuple[Claim, ...] = ()
    liars: tuple[Claim, ...] = ()
    note: str = ""
    paused: bool = False


def module_norms(norms: Mapping[str, float]) -> dict[str, float]:
    """Those of the contributions to modules."""
    return {name: norm for name, norm in norms.items() if name != _INNER_STATE}


def result_of(claim: Claim) -> TaskResult:
    """The result that was claimed."""
    return TaskResult(outputs=claim.outputs, **claim.result)


def agree(one: Claim, other: Claim) -> bool:
    """Whether two claims are the same result, as the head of this file defines it."""
    left, right = _told(one), _told(other)
    if one.fingerprint == other.fingerprint:
        return one.outputs == other.outputs and left == right
    return (
        all(left[key] == right[key] for key in ("tokens", "sequences", "steps"))
        and _near(left["loss_sum"] or 0.0, right["loss_sum"] or 0.0, NORM_TOLERANCE)
        and all(
            _near(one.norms.get(name, 0.0), other.norms.get(name, 0.0), _tolerance(name))
            for name in one.norms.keys() | other.norms.keys()
        )
    )


def _near(one: float, other: float, tolerance: float) -> bool:
    return abs(one - other) <= tolerance * max(abs(one), abs(other))


def _tolerance(name: str) -> float:
    return INNER_STATE_TOLERANCE if name == _INNER_STATE else NORM_TOLERANCE


def differ(claims: tuple[Claim, ...]) -> bool:
    """Whether two workers have claimed a task that does not count yet: their results are not the same."""
    return len({claim.identity for claim in claims}) > 1


def _told(claim: Claim) -> dict[str, Any]:
    """What a result says of itself that follows from the task alone."""
    keys = ("tokens", "sequences", "steps", "loss_sum", "step_losses")
    return {key: claim.result.get(key) for key in keys}


def judge(task: Task, claim: Claim) -> Verdict:
    """What one more claim decides."""
    claims = (*task.claims, claim)
    agreeing = tuple(other for other in claims if other is claim or agree(other, claim))
    if len(agreeing) > 1 and (differ(agreeing) or not differ(claims)):
        return _agreed(task, claims, agreeing)
    if not task.audited and not claim.outlier:
        note = f"task {task.task_id}: the result of {claim.worker} counts, not the outlier of {names_of(task.claims)}"
        return Verdict(claims, claim, suspects=task.claims, note=note if task.claims else "")
    if len(claims) < MAX_CLAIMS:
        return Verdict(claims, note=_waiting(task, claims))
    note = (
        f"task {task.task_id} has {len(claims)} different results, of {names_of(claims)}: workers of one fingerprint "
        "class should agree bit for bit; check their machines and versions, or set execution.audit_share to 0 and "
        "execution.quarantine_factor to null, and start again"
    )
    return Verdict(claims, note=note, paused=True)


def _agreed(task: Task, claims: tuple[Claim, ...], agreeing: tuple[Claim, ...]) -> Verdict:
    counted, identities = agreeing[0], {claim.identity for claim in agreeing}
    others = tuple(claim for claim in claims if claim not in agreeing and claim.identity not in identities)
    if len(identities) == 1:
        note = f"{counted.worker} computed it twice, as no other worker could, and its result counts"
    elif not task.audited:
        note = f"{counted.outlier}, but {names_of(agreeing)} agree on it, so it counts"
    else:
        note = (
            f"{names_of(others)} differs from {names_of(agreeing)} and is banned; the evidence is kept"
            if others
            else ""
        )
    note = f"task {task.task_id}: {note}" if note else ""
    if task.audited and len(identities) > 1:
        return Verdict(claims, counted, liars=others, note=note)
    return Verdict(claims, counted, suspects=others, note=note)


def _waiting(task: Task, claims: tuple[Claim, ...]) -> str:
    claim = claims[-1]
    if len(claims) > 1:
        return f"task {task.task_id}: the results of {names_of(claims)} differ; one more worker decides"
    if claim.outlier:
        return f"task {task.task_id}: the result of {claim.worker} waits in quarantine: {claim.outlier}"
    return ""


def names_of(claims: tuple[Claim, ...]) -> str:
    """Whose claims these are, for a sentence."""
    return " and ".join(dict.fromkeys(claim.worker for claim in claims))
