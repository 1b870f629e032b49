"""Reads what completed tasks have left in the store."""

from __future__ import annotations

from collections.abc import Iterator

from coordinator.state import State
from model.store import BlobStore


def outputs_of(store: BlobStore, state: State, stage: str, kind: str, name: str) -> Iterator[tuple[str, bytes]]:
    """(subject, bytes) of one output of all completed tasks of a kind, in the order in which they were made.

    Read one after the other: all of them together grow with paths and documents.
    """
    for task in state.tasks_of(stage):
        if task.kind == kind and name in task.outputs:
            yield task.subject, store.path(task.outputs[name].digest).read_bytes()
