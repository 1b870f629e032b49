"""What every kind of task takes and gives besides its spec: a progress callback in, output files and a result out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from model.store import file_digest
from protocol.tasks import BlobRef, TaskResult

# Called between steps with (steps or sequences done, latest loss in nats per token or NaN, tokens done).
# It may raise TaskStopped: the task then ends there and leaves nothing that counts.
Progress = Callable[[int, float, int], None]


class TaskStopped(Exception):
    """The task was given up between steps: its lease is lost, or the worker leaves."""


class HandedBack(TaskStopped):
    """The worker leaves and gives the task back: its partial progress is worth keeping."""


@dataclass(frozen=True, slots=True)
class TaskOutcome:
    """Output files by name, not yet uploaded, and the result that names their digests."""

    files: Mapping[str, Path]
    result: TaskResult


def no_progress(steps: int, loss: float, tokens: int) -> None:
    """Progress that nobody follows."""


def blob_of(path: Path) -> BlobRef:
    """The reference of a finished file."""
    digest, size = file_digest(path)
    return BlobRef(digest=digest, size=size)
