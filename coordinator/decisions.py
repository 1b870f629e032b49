"""What decisions come to: rows to store and apply, a lease, a module step that is due."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from coordinator.state import Claim, Module, Row, Task
from protocol.tasks import BlobRef, Message


@dataclass(frozen=True, slots=True)
class Dispute:
    """Claims of a task that differ, as evidence: the fence of the one that counts, those of banned workers, and why."""

    task_id: str
    claims: tuple[Claim, ...]
    counted: int | None
    banned: tuple[int, ...]
    note: str


@dataclass(frozen=True, slots=True)
class Decision:
    """What to store (in one transaction) and then to apply; `notes` are told to a person, `disputes` kept as files."""

    rows: tuple[Row, ...] = ()
    metrics: tuple[dict[str, Any], ...] = ()
    obsolete: tuple[str, ...] = ()
    finished_tasks: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    disputes: tuple[Dispute, ...] = ()


@dataclass(frozen=True, slots=True)
class Lease:
    """A task handed out (`task` set), or why there is none."""

    decision: Decision = Decision()
    task: Task | None = None
    fence: int = 0
    spec: Message | None = None
    waiting_for: str = ""
    finished: bool = False


@dataclass(frozen=True, slots=True)
class StepDue:
    """A module whose contributions for its version are all in: (shard, weight, blob) in shard order."""

    model: str
    module: Module
    contributions: tuple[tuple[int, float, BlobRef], ...]
