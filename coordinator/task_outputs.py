"""Reads what completed tasks have left in the store."""

from __future__ import annotations

from coordinator.state import State
from model.store import BlobStore


def outputs_of(store: BlobStore, state: State, stage: str, kind: str, name: str) -> list[tuple[str, bytes]]:
    """(subject, bytes) of one output of all completed tasks of a kind, in the order in which they were made."""
    tasks = [task for task in state.tasks_of(stage) if task.kind == kind and name in task.outputs]
    return [(task.subject, store.path(task.outputs[name].digest).read_bytes()) for task in tasks]
