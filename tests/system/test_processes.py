"""Whole runs of separate processes: the same bits with any number of workers, and whatever is killed whenever."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator.journal import Journal, RunUnusable
from coordinator.snapshot import RunSnapshot
from dipaco.run_digest import run_digest

PATIENCE_S = 240.0


def dipaco(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "dipaco", *map(str, words)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


class Cluster:
    """A coordinator and workers as processes that a test starts, kills and starts again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_dir = folder / "run"
        self.processes: list[subprocess.Popen[bytes]] = []
        self.port = 0

    def start(self, name: str, *words: str | Path) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(dipaco(*words), cwd=self.folder, stdout=log, stderr=log, env=environment())
        self.processes.append(process)
        return process

    def coordinator(self) -> subprocess.Popen[bytes]:
        """Start (again) on the same address, which is chosen the first time."""
        address = self.run_dir / "address"
        address.unlink(missing_ok=True)
        listen = f"127.0.0.1:{self.port}"
        process = self.start("coordinator", "coordinator", "tiny.yaml", "--run-dir", self.run_dir, "--listen", listen)
        self.wait_for(address.exists)
        self.port = int(address.read_text().rpartition(":")[2])
        return process

    def worker(self, name: str) -> subprocess.Popen[bytes]:
        return self.start(name, "worker", f"127.0.0.1:{self.port}", "--cache-dir", self.folder / name)

    def completed(self) -> int:
        """Tasks that count so far."""
        try:
            journal = Journal(self.run_dir, read_only=True)
        except RunUnusable:
            return 0
        try:
            return sum(1 for _ in journal.metrics())
        finally:
            journal.close()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        until = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < until, self.logs()
            time.sleep(0.02)

    def logs(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in self.folder.glob("*.log"))

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        process.send_signal(signal.SIGKILL)
        process.wait()

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                self.kill(process)


@pytest.fixture
def cluster(tmp_path: Path, prepare_tiny: Callable[[Path], Path]) -> Iterator[Cluster]:
    prepare_tiny(tmp_path)
    made = Cluster(tmp_path)
    yield made
    made.close()


def run(folder: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(dipaco(*words), cwd=folder, env=environment(), capture_output=True, text=True, timeout=240)


def everything(run_dir: Path) -> str:
    """The digest over weights, outer and inner states, router, shards and counts."""
    return run_digest(RunSnapshot.open(run_dir), everything=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, prepare_tiny: Callable[[Path], Path]) -> tuple[Path, str]:
    """A finished run with one worker, and its digest."""
    folder = tmp_path_factory.mktemp("undisturbed")
    prepare_tiny(folder)
    done = run(folder, "run", "tiny.yaml", "--workers", "1", "--run-dir", "run")
    assert done.returncode == 0, done.stderr
    return folder, everything(folder / "run")


def test_two_workers_give_the_same_bits(
    tiny_run: tuple[Path, subprocess.CompletedProcess[str]], undisturbed: tuple[Path, str]
) -> None:
    folder, done = tiny_run
    assert done.returncode == 0, done.stderr
    assert everything(folder / "runs" / "tiny") == undisturbed[1]


def test_three_workers_give_the_same_bits(
    tmp_path: Path, prepare_tiny: Callable[[Path], Path], undisturbed: tuple[Path, str]
) -> None:
    prepare_tiny(tmp_path)
    done = run(tmp_path, "run", "tiny.yaml", "--workers", "3", "--run-dir", "run")
    assert done.returncode == 0, done.stderr
    assert everything(tmp_path / "run") == undisturbed[1]


def test_killing_everything_in_turn_changes_no_bit(cluster: Cluster, undisturbed: tuple[Path, str]) -> None:
    """SIGKILL the worker at every eighth completed task, and the coordinator with every second worker."""
    coordinator, worker = cluster.coordinator(), cluster.worker("worker-0")
    seen, lives, until = 0, 0, time.monotonic() + PATIENCE_S
    while coordinator.poll() is None:
        assert worker.poll() is None or coordinator.wait(20) == 0, cluster.logs()
        assert time.monotonic() < until, cluster.logs()
        done = cluster.completed()
        if done >= seen + 8:
            seen, lives = done, lives + 1
            cluster.kill(worker)
            if lives % 2 == 0:
                cluster.kill(coordinator)
                coordinator = cluster.coordinator()
            worker = cluster.worker(f"worker-{lives}")
        time.sleep(0.02)
    assert coordinator.returncode == 0, cluster.logs()
    assert lives >= 3
    assert everything(cluster.run_dir) == undisturbed[1]


def test_the_report_counts_what_the_journal_counts(undisturbed: tuple[Path, str]) -> None:
    folder, _ = undisturbed
    report: dict[str, Any] = json.loads((folder / "run" / "report.json").read_text())
    journal = Journal(folder / "run", read_only=True)
    trained = sum(metric["tokens"] for metric in journal.metrics() if metric["kind"] == "TRAIN")
    journal.close()
    assert report["tokens"]["trained"] == trained > 0
    assert {"sequence", "every:16", "oracle:sequence", "oracle:every:16"} <= set(report["perplexity"]["dipaco"])


def test_evaluation_repeats_the_reports_numbers(undisturbed: tuple[Path, str]) -> None:
    folder, _ = undisturbed
    report = json.loads((folder / "run" / "report.json").read_text())
    again = run(folder, "evaluate", "run", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["perplexity"] == report["perplexity"]


def test_a_worker_that_starts_first_waits_and_says_so(cluster: Cluster) -> None:
    cluster.port = 1  # nobody listens there
    worker = cluster.worker("early")
    log = cluster.folder / "early.log"
    cluster.wait_for(lambda: "nobody answers" in log.read_text())
    assert worker.poll() is None


def test_a_locked_run_directory_is_refused(cluster: Cluster) -> None:
    cluster.coordinator()
    second = run(cluster.folder, "coordinator", "tiny.yaml", "--run-dir", cluster.run_dir, "--listen", "127.0.0.1:0")
    assert second.returncode == 1
    assert "locked by another coordinator" in second.stderr
    assert "Traceback" not in second.stderr


def test_a_changed_experiment_is_refused_on_resume(undisturbed: tuple[Path, str]) -> None:
    folder, _ = undisturbed
    changed = (folder / "tiny.yaml").read_text().replace("learning_rate: 3.0e-3", "learning_rate: 2.0e-3")
    (folder / "changed.yaml").write_text(changed)
    refused = run(folder, "coordinator", "changed.yaml", "--run-dir", "run", "--listen", "127.0.0.1:0")
    assert refused.returncode == 1
    assert "experiment.inner.learning_rate" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_run_of_other_numerics_is_refused(undisturbed: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = undisturbed
    shutil.copytree(folder / "run", tmp_path / "run")
    with sqlite3.connect(tmp_path / "run" / "state.db") as connection:
        connection.execute("UPDATE meta SET value = '0' WHERE key = 'numerics'")
    connection.close()
    shutil.copy(folder / "tiny.yaml", tmp_path)
    refused = run(tmp_path, "coordinator", "tiny.yaml", "--run-dir", "run", "--listen", "127.0.0.1:0")
    assert refused.returncode == 1
    assert "numerics version 0" in refused.stderr
