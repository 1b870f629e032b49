"""Partial progress of a TRAIN task: taken between steps, sent beside them, and read by the next holder.

The steps wait only for a copy in memory; a thread writes the file, uploads it and tells the coordinator. One is under
way at a time, and none is waited for where the task ends first: what is lost with it is time, never a result.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model import tensor_file
from protocol.errors import WIRE_ERRORS
from protocol.tasks import BlobRef, Checkpoint
from worker.heartbeat import Say
from worker.pace import Pace

CHECKPOINT = "checkpoint"
NOT_SENT: tuple[type[Exception], ...] = (OSError, *WIRE_ERRORS)
# Uploads a file as the task's checkpoint; raises one of WIRE_ERRORS.
Send = Callable[[Path, Checkpoint], None]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A copy of the state after some steps: float32 tensors `p.`, `m.` and `v.<tensor>`, and all but their blob."""

    tensors: Mapping[str, np.ndarray]
    tokens: int
    sequences: int
    loss_sum: float
    step_losses: list[float]
    seconds: float

    def write(self, path: Path) -> Checkpoint:
        """The tensors as a file, and the message that announces it."""
        digest, size = tensor_file.write(path, self.tensors)
        return Checkpoint(
            blob=BlobRef(digest=digest, size=size),
            steps=len(self.step_losses),
            tokens=self.tokens,
            sequences=self.sequences,
            loss_sum=self.loss_sum,
            step_losses=self.step_losses,
            seconds=self.seconds,
        )


class Checkpoints:
    """The partial progress of one task under one lease. Without a `pace` none is sent.

    `resume_path`: the file of the checkpoint that the spec names. `grace_s`: how long a worker that leaves tries.
    """

    def __init__(
        self,
        send: Send,
        pace: Pace | None,
        directory: Path,
        say: Say,
        *,
        resume_path: Path | None = None,
        grace_s: float = 10.0,
    ) -> None:
        self._send, self._pace, self._say = send, pace, say
        self._path = directory / CHECKPOINT
        self.resume_path = resume_path
        self._grace_s = grace_s
        self._latest_s = time.monotonic()
        self._under_way: threading.Thread | None = None
        self._over = False

    def begin(self) -> None:
        """The steps begin now."""
        self._latest_s = time.monotonic()

    def offer(self, take: Callable[[], Snapshot]) -> None:
        """After a step: send what `take` returns, if it is due and none is under way."""
        since_s = time.monotonic() - self._latest_s
        if self._pace is not None and self._pace.is_due(since_s) and not self._is_under_way():
            self._start(take, self._pace)

    def hand_over(self, take: Callable[[], Snapshot]) -> None:
        """The worker leaves: send what `take` returns, and wait for it as long as the grace lasts."""
        if self._pace is not None:
            self._join(self._grace_s / 2)
            self._start(take, self._pace)
            self._join(self._grace_s / 2)

    def end(self) -> None:
        """The task is over; what is under way is given up by whoever ends its calls."""
        self._over = True

    def wait(self, timeout_s: float) -> None:
        """Until nothing is under way."""
        self._join(timeout_s)

    def _is_under_way(self) -> bool:
        return self._under_way is not None and self._under_way.is_alive()

    def _join(self, timeout_s: float) -> None:
        if self._under_way is not None:
            self._under_way.join(timeout_s)

    def _start(self, take: Callable[[], Snapshot], pace: Pace) -> None:
        began_s = time.monotonic()
        snapshot = take()
        self._latest_s = time.monotonic()
        arguments = (snapshot, pace, began_s, self._latest_s - began_s)
        self._under_way = threading.Thread(target=self._deliver, args=arguments, name="checkpoint", daemon=True)
        self._under_way.start()

    def _deliver(self, snapshot: Snapshot, pace: Pace, began_s: float, copied_s: float) -> None:
        try:
            self._send(self._path, snapshot.write(self._path))
        except NOT_SENT as error:
            if not self._over:
                self._say(f"partial progress was not kept ({error}); the task goes on")
            return
        pace.took(copied_s + time.thread_time(), time.monotonic() - began_s)
