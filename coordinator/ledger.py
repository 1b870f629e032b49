"""The seam between decisions and facts: stores a decision, makes it current, lets go of what it made obsolete.

Memory never lags behind the journal: nothing that can fail stands between the transaction and the state. Where it
cannot be stored, the state machine is again what the rows say. Called on the event loop alone.
"""

from __future__ import annotations

import errno
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coordinator.decisions import Decision, Dispute
from coordinator.evidence import keep_evidence
from coordinator.garbage import Garbage
from coordinator.journal import Journal
from coordinator.machine import Machine
from coordinator.room import Room
from coordinator.status import Tally
from model.store import BlobStore
from protocol.errors import WaitingForRoom


class Ledger:
    """The decisions of one run, on disk and in memory."""

    def __init__(
        self,
        run_dir: Path,
        machine: Machine,
        journal: Journal,
        store: BlobStore,
        room: Room,
        fail: Callable[[Exception], None],
    ) -> None:
        """`fail` is told where the run directory cannot be written: the process is to end, a restart goes on."""
        self.machine, self.store, self.room = machine, store, room
        self.garbage = Garbage(store, machine)
        self.tally = Tally()
        self._run_dir, self._journal, self._fail = run_dir, journal, fail
        for metric in journal.metrics():
            self._learn(metric)

    def commit(self, decision: Decision) -> list[tuple[Path, Dispute]]:
        """Raises WaitingForRoom, with leases as they were, where there is no room for the decision now.

        Returns where the evidence of its bans lies, which is to be measured.
        """
        bans = self._store(decision)
        self.machine.apply(decision)
        for metric in decision.metrics:
            self._learn(metric)
        self.garbage.let_go(decision.obsolete)
        return bans

    def counts(self, task_id: str, fence: int) -> bool:
        """Whether the task was completed, or its result under this fence waits as a claim."""
        return self._journal.has_metric(task_id) or self.machine.claims.holds(task_id, fence)

    def _store(self, decision: Decision) -> list[tuple[Path, Dispute]]:
        """The evidence it rests on, then one transaction; after any error leases are again what the rows say."""
        try:
            kept = [(keep_evidence(self._run_dir, self.store, dispute), dispute) for dispute in decision.disputes]
            if decision.rows or decision.metrics:
                self._journal.commit(decision.rows, decision.metrics)
        except BaseException as error:
            self.machine.leases.reconcile(time.monotonic())
            if self.room.lacked_by(error):
                self.room.refused()
                raise WaitingForRoom(self.room.waiting) from None
            if isinstance(error, (OSError, sqlite3.OperationalError)):
                what = f"{self._run_dir} cannot be written ({error}); mend that and start again"
                self._fail(OSError(errno.EIO, what))
            raise
        return [(folder, dispute) for folder, dispute in kept if dispute.banned]

    def _learn(self, metric: dict[str, Any]) -> None:
        self.tally.add(metric)
        self.machine.claims.learn(metric)
