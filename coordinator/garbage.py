"""Deletes blobs that no row needs any more, and never one that a row names or is about to name.

What is on its way into a row is protected from before it lies in the store: for as long as somebody says so, and the
outputs of a task until the task is over, since a worker whose call was cut off asks for the same transaction again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from coordinator.machine import Machine
from model.store import BlobStore


class Garbage:
    """The unreferenced blobs of one run. Called on the event loop alone."""

    def __init__(self, store: BlobStore, machine: Machine) -> None:
        self._store, self._machine = store, machine
        self._landing: Counter[str] = Counter()
        self._of_task: dict[str, set[str]] = {}

    @contextmanager
    def landing(self, digests: Iterable[str]) -> Iterator[None]:
        """Blobs on their way into the store: another decision that lets go of equal bytes must not delete them."""
        landing = Counter(digests)
        self._landing += landing
        try:
            yield
        finally:
            self._landing -= landing

    def landing_of_task(self, task_id: str, digests: Iterable[str]) -> None:
        """The same for outputs of an open task, until it is over; those that no row has taken then are deleted."""
        self._of_task.setdefault(task_id, set()).update(digests)

    def let_go(self, digests: Iterable[str] = ()) -> None:
        """Delete those of `digests`, and of the outputs of tasks that are over, that nothing needs."""
        doubtful = set(digests)
        for task_id in [task_id for task_id in self._of_task if not self._is_open(task_id)]:
            doubtful |= self._of_task.pop(task_id)
        if doubtful:
            for digest in doubtful - self._machine.referenced() - self._landing.keys() - self._outputs():
                self._store.delete(digest)

    def _is_open(self, task_id: str) -> bool:
        task = self._machine.state.tasks.get(task_id)
        return task is not None and task.status != "done"

    def _outputs(self) -> set[str]:
        return set().union(*self._of_task.values())
