"""Partial progress of a TRAIN task: taken between steps, sent beside them, and read by the next holder.

The steps wait only for a copy in memory; a thread writes the file, uploads it and tells the coordinator. One is under
way at a time, and none is waited for where the task ends first: what is lost with it is time, never a result.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model import tensor_file
from protocol.errors import WIRE_ERRORS
from protocol.tasks import BlobRef, Checkpoint
from worker.heartbeat import Say
from worker.pace import Pace
from worker.probe import free_host_memory_bytes

CHECKPOINT = "checkpoint"
# A copy is made where the machine has so many times its size to spare.
MEMORY_SHARE = 1.5
NOT_SENT: tuple[type[Exception], ...] = (OSError, *WIRE_ERRORS)
# Uploads a file as the task's checkpoint; raises one of WIRE_ERRORS.
Send = Callable[[Path, Checkpoint], None]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A copy of the state after some steps: parameters `p.<tensor>` and the inner state, and all but their blob."""

    tensors: dict[str, np.ndarray]
    tokens: int
    sequences: int
    loss_sum: float
    step_losses: list[float]
    seconds: float

    @property
    def steps(self) -> int:
        return len(self.step_losses)

    def write(self, path: Path) -> Checkpoint:
        """The tensors as a file, and the message that announces it; the copy in memory is let go of."""
        digest, size = tensor_file.write(path, self.tensors)
        self.tensors.clear()
        return Checkpoint(
            blob=BlobRef(digest=digest, size=size),
            steps=self.steps,
            tokens=self.tokens,
            sequences=self.sequences,
            loss_sum=self.loss_sum,
            step_losses=self.step_losses,
            seconds=self.seconds,
        )


class Checkpoints:
    """The partial progress of one task under one lease. Without a `pace` none is sent.

    `resume_path`: the file of the checkpoint that the spec names. `left_s`: for how long a worker that leaves may try.
    """

    def __init__(
        self,
        send: Send,
        pace: Pace | None,
        directory: Path,
        say: Say,
        *,
        resume_path: Path | None = None,
        left_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._send, self._pace, self._say = send, pace, say
        self._directory = directory
        self.resume_path = resume_path
        self._left_s = left_s
        self._latest_s = time.monotonic()
        self._latest_steps = 0
        self._under_way: threading.Thread | None = None
        self._over = False

    def begin(self) -> None:
        """The steps begin now."""
        self._latest_s = time.monotonic()

    def offer(self, take: Callable[[], Snapshot], copy_bytes: int) -> None:
        """After a step: send what `take` returns, `copy_bytes` of memory, if it is due and none is under way."""
        since_s = time.monotonic() - self._latest_s
        if self._pace is not None and self._pace.is_due(since_s) and not self._is_under_way():
            self._start(take, copy_bytes, self._pace)

    def hand_over(self, take: Callable[[], Snapshot], copy_bytes: int, steps: int) -> None:
        """The worker leaves after so many steps: send them, and wait for that as long as there is time."""
        if self._pace is None:
            return
        if self._is_under_way() and self._latest_steps < steps:
            self.wait(self._left_s() / 2)
        if self._latest_steps < steps and self._left_s() > 0:
            self._start(take, copy_bytes, self._pace)
        self.wait(self._left_s())

    def end(self) -> None:
        """The task is over; what is under way is given up by whoever ends its calls."""
        self._over = True

    def wait(self, timeout_s: float) -> None:
        """Until nothing is under way, or the time is over."""
        if self._under_way is not None:
            self._under_way.join(max(0.0, timeout_s))

    def _is_under_way(self) -> bool:
        return self._under_way is not None and self._under_way.is_alive()

    def _start(self, take: Callable[[], Snapshot], copy_bytes: int, pace: Pace) -> None:
        began_s = time.monotonic()
        self._latest_s = began_s
        if free_host_memory_bytes() < MEMORY_SHARE * copy_bytes:
            self._failed(pace, 0.0, began_s, f"a copy of {copy_bytes / 1e6:.0f} MB finds no memory")
            return
        snapshot = take()
        self._latest_s, self._latest_steps = time.monotonic(), snapshot.steps
        arguments = (snapshot, pace, began_s, self._latest_s - began_s)
        self._under_way = threading.Thread(target=self._deliver, args=arguments, name="checkpoint", daemon=True)
        self._under_way.start()

    def _deliver(self, snapshot: Snapshot, pace: Pace, began_s: float, copied_s: float) -> None:
        path = self._directory / f"{CHECKPOINT}-{snapshot.steps}"
        try:
            self._send(path, snapshot.write(path))
            pace.took(copied_s + time.thread_time(), time.monotonic() - began_s)
        except NOT_SENT as error:
            self._failed(pace, copied_s + time.thread_time(), began_s, str(error))
        finally:
            path.unlink(missing_ok=True)

    def _failed(self, pace: Pace, cost_s: float, began_s: float, why: str) -> None:
        """Say so once in a row, and try less often."""
        if not (self._over or pace.failures):
            self._say(f"partial progress was not kept ({why}); the task goes on")
        pace.failed(cost_s, time.monotonic() - began_s)
