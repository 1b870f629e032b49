"""The coordinator under attack: a process of its own, a small run in it, and an honest worker who goes on with it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from configs.load import to_yaml
from configs.schema import Config
from dipaco.run_digest import run_digest
from scripts.crash_points import ROOT, finished_run, small_config
from worker.loop import run_worker

# How long the honest worker may say nothing.
PATIENCE_S = 300.0
START_S = 120.0
_LISTENING = re.compile(rb"listening on (\S+)")
# What a log must not hold, whatever arrived.
_BROKEN = re.compile(rb"Traceback \(most recent call last\)|failed unexpectedly|Exception|AssertionError")


class TargetFailed(RuntimeError):
    """The coordinator or the honest worker did not do what they do undisturbed."""


def fuzzed_config(folder: Path, phases: int) -> Config:
    """The small run of the crash points with this number of phases; no failed attempt pauses it."""
    config = small_config(folder)
    stages = [
        stage.model_copy(update={"phases": phases}) if stage.kind == "train" else stage
        for stage in config.experiment.stages
    ]
    experiment = config.experiment.model_copy(update={"stages": stages})
    execution = config.execution.model_copy(update={"max_attempts": 1_000_000})
    return config.model_copy(update={"experiment": experiment, "execution": execution})


class Target:
    """One run in `folder`, from its start to its end; its coordinator may open so many files at the most."""

    def __init__(self, folder: Path, phases: int, open_files: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.run_dir, self._log, self._folder = folder / "run", folder / "coordinator.log", folder
        self._config = folder / "config.yaml"
        config = fuzzed_config(folder, phases)
        self._config.write_text(to_yaml(config), encoding="utf-8")
        self._limited = [] if open_files is None else ["sh", "-c", f'ulimit -n {open_files}; exec "$@"', "sh"]
        self.num_tasks = phases * 2
        self.address = ""
        self._read_bytes = 0
        self._worker_error: BaseException | None = None

    @contextmanager
    def running(self) -> Iterator[Target]:
        """The coordinator, listening; it is gone afterwards."""
        command = [sys.executable, "-m", "dipaco", "coordinator", str(self._config), "--run-dir", str(self.run_dir)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*self._limited, *command, "--listen", "127.0.0.1:0"],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        try:
            self._await_address()
            yield self
        finally:
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait()

    def _await_address(self) -> None:
        deadline = time.monotonic() + START_S
        while not (found := _LISTENING.search(self._log.read_bytes())):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise TargetFailed(f"the coordinator does not listen; see {self._log}")
            time.sleep(0.05)
        self.address = found[1].decode()
        self._measured = psutil.Process(self._process.pid)

    def honest_worker(self, share: Callable[[], float]) -> threading.Thread:
        """A worker that has done, at any time, about this share of the TRAIN tasks of the mixture."""
        done = 0
        self._heard_s = time.monotonic()

        def heard(line: str) -> None:
            nonlocal done
            self._heard_s = time.monotonic()
            if "/TRAIN/" in line and ": done in" in line:
                done += 1
                while self.alive and (now := share()) < 1 and done > now * self.num_tasks:
                    time.sleep(0.02)

        def work() -> None:
            try:
                run_worker(
                    self.address, None, self._folder / "worker", 1, name="honest", memory_bytes=1 << 30, say=heard
                )
            except BaseException as error:
                self._worker_error = error

        thread = threading.Thread(target=work, name="honest", daemon=True)
        thread.start()
        return thread

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def memory(self) -> tuple[int, int]:
        """Resident bytes and open file descriptors of the coordinator."""
        return int(self._measured.memory_info().rss), int(self._measured.num_fds())

    def complaint(self) -> str:
        """What the coordinator's log says since the last look that it should not."""
        with self._log.open("rb") as log:
            log.seek(max(0, self._read_bytes - 200))
            new = log.read()
            self._read_bytes = log.tell()
        found = _BROKEN.search(new)
        return "" if found is None else new[found.start() : found.start() + 1500].decode(errors="replace")

    def digest(self, worker: threading.Thread) -> str:
        """The digest of the run once its worker has finished it; raises TargetFailed."""
        while worker.is_alive() and time.monotonic() < self._heard_s + PATIENCE_S:
            worker.join(1.0)
        if worker.is_alive() or self._worker_error is not None:
            raise TargetFailed(f"the honest worker does not come to its end ({self._worker_error})")
        try:
            self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise TargetFailed("the coordinator does not end with its run") from None
        return run_digest(finished_run(self.run_dir), everything=True)


def undisturbed_digest(folder: Path, phases: int) -> str:
    """What the same run comes to when nobody attacks it."""
    with Target(folder, phases).running() as target:
        return target.digest(target.honest_worker(lambda: 1.0))


os.environ.setdefault("OMP_NUM_THREADS", "1")
