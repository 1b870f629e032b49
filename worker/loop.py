"""One machine's loop: join, lease, do the task, lease again; leave on a signal without losing what is nearly done.

A shell: what a task computes and what the coordinator decides stand elsewhere. The client repeats calls while nobody
answers, so a coordinator that restarts is waited for, under the same worker id.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from configs.schema import Config
from protocol.address import parse_address
from protocol.credentials import Credentials
from protocol.errors import WIRE_ERRORS, Unavailable
from protocol.tasks import Capabilities
from worker.cache import BlobCache
from worker.calls import Connect, Coordinator
from worker.client import WorkerClient
from worker.departure import Departure, Leave
from worker.heartbeat import Say
from worker.leased_task import FAREWELL_S, Joined, LeasedTask
from worker.memo import Memo
from worker.pace import Pace
from worker.probe import capabilities
from worker.workspace import Workspace

LEASE_WAIT_S = 20.0
# Cached blobs of at least this size are worth preferring a task for.
LARGE_BLOB_BYTES = 64 * 1024
MAX_CACHED_DIGESTS = 1000


def say_with_time(sentence: str) -> None:
    """A plain log line; one that cannot be written (a full disk, a closed pipe) ends no worker."""
    with suppress(OSError):
        print(f"{time.strftime('%H:%M:%S')} {sentence}", flush=True)


def run_worker(
    address: str,
    join: Path | None,
    cache_dir: Path,
    threads: int,
    name: str | None = None,
    memory_bytes: int | None = None,
    insecure: bool = False,
    say: Say = say_with_time,
    grace_s: float | None = None,
    reuse: Path | None = None,
) -> int:
    """Work for the coordinator at `address` until its run is finished or a signal comes; returns the exit code, 0.

    Raises VersionMismatch, NotAllowed, BadAddress, BadJoinFile, CertificateEnded.
    """
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))  # the tokenizer's threads
    credentials = None if join is None else Credentials.read(join, say)
    target = parse_address(address)

    def connect(patience_s: float | None) -> Coordinator:
        return WorkerClient(target, credentials, insecure=insecure, patience_s=patience_s, say=say)

    worker_name = name or f"{socket.gethostname()}:{os.getpid()}"
    return Worker(connect, cache_dir, worker_name, capabilities(threads, memory_bytes), say, grace_s, reuse).run()


class Worker:
    """One worker process: at most one lease at a time."""

    def __init__(
        self,
        connect: Connect,
        cache_dir: Path,
        name: str,
        offers: Capabilities,
        say: Say,
        grace_s: float | None = None,
        reuse: Path | None = None,
    ) -> None:
        """`grace_s`: what this machine leaves a worker that must go; None: execution.grace_s of the run.

        `reuse`: where results of tasks are kept, and taken from.
        """
        self._connect, self._cache_dir, self._name, self._offers, self._say = connect, cache_dir, name, offers, say
        self._grace_s, self._reuse = grace_s, reuse
        self._client = connect(None)
        self._workspace = Workspace(cache_dir / "outputs")
        self.departure = Departure(self._client.close)

    def run(self) -> int:
        """Work until the run is finished or the worker is asked to leave."""
        try:
            with self.departure.on_signals():
                self._join_and_work()
        finally:
            self._workspace.close()
            self._client.close()
        return 0

    def _join_and_work(self) -> None:
        joined: Joined | None = None
        try:
            with self.departure.cuts_short():
                joined = self._join()
            self._work(joined)
        except (Leave, Unavailable) as error:
            if isinstance(error, Unavailable) and not self.departure.asked.is_set():
                raise
            self._say("leaving")
            if joined is not None:
                self._farewell(joined.worker_id)

    def _join(self) -> Joined:
        welcome = self._client.hello(self._name, self._offers)
        config = Config.model_validate_json(welcome.config_json)
        self._say(f"joined run {welcome.run_name} as {welcome.worker_id} ({self._offers.fingerprint})")
        cache = BlobCache(self._cache_dir, config.execution.cache_bytes)
        execution, beat_s = config.execution, welcome.heartbeat_s
        self.departure.grace_s = execution.grace_s if self._grace_s is None else self._grace_s
        pace = Pace(least_s=beat_s / 2) if execution.checkpoints else None
        memo = None if self._reuse is None else Memo(self._reuse, execution.cache_bytes)
        return Joined(welcome.worker_id, config.experiment, beat_s, cache, pace, self._offers.fingerprint, memo)

    def _work(self, joined: Joined) -> None:
        """Lease and run tasks until the run is finished; raises Leave."""
        said = ""
        while True:
            with self.departure.cuts_short():
                cached = joined.cache.digests(LARGE_BLOB_BYTES)[:MAX_CACHED_DIGESTS]
                lease = self._client.lease(joined.worker_id, LEASE_WAIT_S, cached)
            if lease.finished:
                self._say("the run is finished")
                with suppress(*WIRE_ERRORS):  # the coordinator waits for a moment for those who have not left
                    self._client.release(joined.worker_id, "", 0, leaving=True)
                return
            if lease.spec is not None:
                said = ""
                if joined.pace is not None:
                    joined.pace.mtbf_s = lease.mtbf_s
                LeasedTask(self._client, joined, lease, self.departure, self._say).run(self._workspace, self._connect)
            elif lease.waiting_for != said:
                said = lease.waiting_for
                self._say(f"waiting: {said}")

    def _farewell(self, worker_id: str) -> None:
        """Leave the run, if anybody listens; else the leases end by themselves."""
        client = self._connect(FAREWELL_S)
        with suppress(*WIRE_ERRORS):
            client.release(worker_id, "", 0, leaving=True)
        client.close()
