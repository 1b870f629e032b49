"""Bytes that went over the wire, by what they were: modules, outer gradients, inner state, checkpoints, other."""

from __future__ import annotations

from dataclasses import replace

from coordinator.early_stopping import STOP
from coordinator.state import State

_CATEGORY_OF_KIND = {"module": "outer_gradients", "inner_state": "inner_state", "checkpoint": "checkpoints"}


class Traffic:
    """Counts into the run's standing, which is stored with the next completed task."""

    def __init__(self, state: State) -> None:
        self._state = state

    def fetched(self, digest: str, num_bytes: int) -> None:
        """A blob was asked for."""
        if any(row.params.digest == digest for row in self._state.modules.values()) or self._is_measured(digest):
            self._count("modules", num_bytes)
        elif any(row.inner_state and row.inner_state.digest == digest for row in self._state.shards.values()):
            self._count("inner_state", num_bytes)
        elif any(row.checkpoint and row.checkpoint.blob.digest == digest for row in self._state.tasks.values()):
            self._count("checkpoints", num_bytes)
        else:
            self._count("other", num_bytes)

    def _is_measured(self, digest: str) -> bool:
        """Whether it is a module of a best version, or of a snapshot that is measured while there are newer ones."""
        if any(module.blob.digest == digest for row in self._state.best.values() for module in row.modules):
            return True
        specs = (task.spec for task in self._state.tasks.values() if task.kind == STOP and task.status != "done")
        return any(module["blob"]["digest"] == digest for spec in specs for module in spec["path"]["modules"])

    def uploaded(self, kind: str, num_bytes: int) -> None:
        """An output of this kind arrived whole."""
        self._count(_CATEGORY_OF_KIND.get(kind, "other"), num_bytes)

    def _count(self, category: str, num_bytes: int) -> None:
        standing = self._state.standing
        moved = {**standing.bytes_moved, category: standing.bytes_moved.get(category, 0) + num_bytes}
        self._state.standing = replace(standing, bytes_moved=moved)
