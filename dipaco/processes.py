"""The processes of a run on one machine: a coordinator and its workers, each with a log, restarted when killed.

They talk over gRPC on loopback exactly as they would between machines. A process that a signal took away is started
again a few times; one that ended by itself has said why in its log, and that is final for a coordinator.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from configs.execution import Execution
from dipaco.ending import UNFINISHED
from dipaco.own_log import LogTail

MAX_RESTARTS = 5
# Reading all blobs of a large run takes its time.
_VERIFY_PATIENCE_S = 86_400.0
_LAST_BYTES = 1 << 16
_LISTENING = re.compile(rb"listening on (\S+)")


DIPACO = (sys.executable, "-m", "dipaco")


@dataclass(slots=True)
class Child:
    """One `dipaco` process and its log, of which it keeps `log_files` of `log_bytes`.

    `arguments` may change before a restart.
    """

    name: str
    arguments: list[str]
    log: Path
    program: Sequence[str] = DIPACO
    log_bytes: int = Execution.model_fields["log_bytes"].default
    log_files: int = Execution.model_fields["log_files"].default
    restarts: int = 0
    _process: subprocess.Popen[bytes] | None = None
    _tail: LogTail | None = None

    def start(self) -> None:
        """Start it, in a session of its own so that Ctrl-C in the terminal reaches only the one who started it."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._tail = LogTail(self.log)
        rotation = ["--log", f"{self.log}:{self.log_bytes}:{self.log_files}"]
        command = [*self.program, *self.arguments, "--parent", str(os.getpid()), *rotation]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it lives; negative where a signal ended it."""
        assert self._process is not None
        return self._process.poll()

    def written(self) -> bytes:
        """What this process has written since its (latest) start."""
        return b"" if self._tail is None else self._tail.read()

    def last_words(self) -> str:
        """The sentence it ended with, without the prefix that every command puts before it."""
        written = self.written()[-_LAST_BYTES:].decode(errors="replace")
        lines = [line.strip() for line in written.splitlines() if line.strip()]
        told = [line for line in lines if line.startswith("dipaco: ")]
        return (told or lines or [f"{self.name} said nothing"])[-1].removeprefix("dipaco: ")

    def terminate(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def wait(self, seconds: float) -> bool:
        """Whether it ended in time."""
        if self._process is None:
            return True
        try:
            self._process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()


class CoordinatorEnded(ValueError):
    """The coordinator ended before the run was finished; the message is what it said."""


class WorkersEnded(ValueError):
    """All workers ended for good before the run was finished; the message is what the last of them said."""


@dataclass(slots=True)
class LocalRun:
    """A coordinator and workers that belong together. `say` receives one line for every event a person should know."""

    config: Path
    run_dir: Path
    num_workers: int
    threads: int
    worker_memory_bytes: int
    say: Callable[[str], None]
    join: Path | None = None
    program: Sequence[str] = DIPACO
    execution: Execution = field(default_factory=Execution)
    verify: bool = False
    reuse: Path | None = None
    coordinator: Child = field(init=False)
    workers: list[Child] = field(init=False, default_factory=list)
    address: str = ""

    def __post_init__(self) -> None:
        first = ["--verify"] if self.verify else []
        self.coordinator = self._child("coordinator", [*self._coordinator_arguments("127.0.0.1:0"), *first])

    def _child(self, name: str, arguments: list[str]) -> Child:
        log = self.run_dir / "logs" / f"{name}.log"
        return Child(name, arguments, log, self.program, self.execution.log_bytes, self.execution.log_files)

    def _coordinator_arguments(self, listen: str) -> list[str]:
        return ["coordinator", str(self.config), "--run-dir", str(self.run_dir), "--listen", listen]

    def start(self, patience_s: float = 120.0) -> None:
        """Start the coordinator, wait for its address, start the workers. Raises CoordinatorEnded."""
        self.coordinator.start()
        deadline = time.monotonic() + (_VERIFY_PATIENCE_S if self.verify else patience_s)
        while not self.address:
            found = _LISTENING.search(self.coordinator.written())
            if found is not None:
                self.address = found[1].decode()
            elif self.coordinator.exit_code is not None:
                if self.coordinator.exit_code == 0:
                    return
                raise CoordinatorEnded(self.coordinator.last_words())
            elif time.monotonic() > deadline:
                raise CoordinatorEnded(f"it did not listen within {patience_s:.0f} s; see {self.coordinator.log}")
            else:
                time.sleep(0.05)
        self.coordinator.arguments = self._coordinator_arguments(self.address)
        for _ in range(self.num_workers):
            self.add_worker().start()

    def add_worker(self, address: str = "") -> Child:
        """One more worker, not started yet; it finds the coordinator at its address, or behind another one."""
        index = len(self.workers)
        worker = self._child(f"worker-{index}", self._worker_arguments(index, address or self.address))
        self.workers.append(worker)
        return worker

    def _worker_arguments(self, index: int, address: str) -> list[str]:
        cache = str(self.run_dir / "workers" / str(index))
        shares = ["--threads", str(self.threads), "--memory-bytes", str(self.worker_memory_bytes)]
        trust = [] if self.join is None else ["--join", str(self.join)]
        reuse = [] if self.reuse is None else ["--reuse", str(self.reuse)]
        return ["worker", address, "--cache-dir", cache, "--name", f"worker-{index}", *shares, *trust, *reuse]

    def watch(self) -> bool:
        """Restart what a signal took away; True once the coordinator has ended well: the run is finished.

        Raises CoordinatorEnded and WorkersEnded where nothing more will come.
        """
        code = self.coordinator.exit_code
        if code == 0:
            return True
        was_taken_away = code is not None and (code < 0 or code == UNFINISHED)
        if code is not None and not (was_taken_away and self._restart(self.coordinator)):
            raise CoordinatorEnded(self.coordinator.last_words())
        alive = 0
        for worker in self.workers:
            code = worker.exit_code
            alive += code is None or (code != 0 and self._restart(worker))
        if self.workers and not alive and any(worker.exit_code for worker in self.workers):
            raise WorkersEnded(next(worker.last_words() for worker in self.workers if worker.exit_code))
        return False

    def _restart(self, child: Child) -> bool:
        if child.restarts >= MAX_RESTARTS:
            return False
        code = child.exit_code
        how = f"was killed (signal {-code})" if code is not None and code < 0 else f"ended ({child.last_words()})"
        child.restarts += 1
        self.say(f"{child.name} {how}; starting it again ({child.restarts} of {MAX_RESTARTS})")
        child.start()
        return True

    def stop(self, patience_s: float = 20.0) -> None:
        """End everything in order: workers hand their tasks back, then the coordinator closes the run directory."""
        for group in (self.workers, [self.coordinator]):
            _end(group, patience_s)


def _end(children: Sequence[Child], patience_s: float) -> None:
    for child in children:
        child.terminate()
    deadline = time.monotonic() + patience_s
    for child in children:
        if not child.wait(max(0.0, deadline - time.monotonic())):
            child.kill()
