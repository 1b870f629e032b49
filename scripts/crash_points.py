"""Kills the coordinator of a small run before and after each of its durable effects, and compares what comes out.

A recorded run numbers the effects (fsync, rename, removal, SQLite's commits). Then, for every number, in a run
directory of its own: kill -9 there, start the coordinator again, let the run finish, and require the same
`digest --all`. The worker lives on in this process. `--dir` keeps results, and the same command goes on with them,
whatever interrupted it; points that came to no digest are tried again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, get_args
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from configs.schema import Config  # noqa: E402
from coordinator.snapshot import RunSnapshot  # noqa: E402
from dipaco.run_digest import run_digest  # noqa: E402
from scripts.counted_coordinator import Order, When  # noqa: E402
from worker import leased_task  # noqa: E402
from worker.checkpoints import Checkpoints, Snapshot  # noqa: E402
from worker.loop import run_worker  # noqa: E402

PATIENCE_S = 120.0
LIVES = 3


class EveryStep(Checkpoints):
    """Partial progress after each step, whatever it costs: its effects belong to the recorded run, at fixed numbers."""

    def offer(self, take: Callable[[], Snapshot], copy_bytes: int) -> None:
        self.hand_over(take, copy_bytes, sys.maxsize)


class CrashRunFailed(RuntimeError):
    """A run that did not come to its end."""


def small_config(folder: Path, documents: int = 24, *, reshard: bool = False) -> Config:
    """All stages but evaluation, two paths that share a module, two phases; its documents are written to `folder`.

    `reshard`: with a re-shard between the phases, and documents that it scores.
    """
    words = (
        "onion butter salt pan stir heat",
        "return self value index range size",
        "licensee party clause herein law",
    )
    lines = [
        json.dumps({"text": " ".join([kind] * 6) + f" number {number}", "domain": kind.split()[0]})
        for number in range(documents // len(words))
        for kind in words
    ]
    (folder / "documents.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    train = {"kind": "train", "phases": 1, "inner_steps": 2}
    trained = [train, {"kind": "reshard"}, train] if reshard else [{**train, "phases": 2}]
    experiment = {
        "seed": 3,
        "corpus": {
            "source": {"kind": "files", "paths": [str(folder / "documents.jsonl")]},
            "splits": {"router": 0.3 if reshard else 0.0, "stop": 0.0, "validation": 0.0, "test": 0.0},
            "min_document_characters": 50,
            "deduplicate": False,
        },
        "tokenizer": {"kind": "bytes"},
        "model": {"blocks": 2, "hidden_size": 16, "heads": 2, "intermediate_size": 16, "sequence_length": 64},
        "topology": {
            "levels": [
                {"modules": 2, "blocks": [0], "embedding": True},
                {"modules": 1, "blocks": [1], "head": True},
            ]
        },
        "sharding": {"kind": "kmeans", "prefix_tokens": 8},
        "inner": {"learning_rate": 1e-2, "warmup_steps": 2, "batch_rows": 2},
        "outer": {"kind": "nesterov"},
        "stages": [{"kind": "pretrain", "steps": 2, "inner_steps": 2}, {"kind": "shard"}, *trained],
    }
    execution = {"heartbeat_s": 0.5, "lease_s": 4.0, "keep_versions": 1}
    return Config.model_validate({"name": "crash-points", "experiment": experiment, "execution": execution})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Coordinators:
    """The process that forks coordinators, ready after its imports."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "scripts.counted_coordinator"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._orders: IO[str] = self._server.stdin
        self._answers: IO[str] = self._server.stdout
        self._child = 0

    def live(self, order: Order) -> int:
        """One life; returns its exit code, negative where a signal ended it."""
        self._orders.write(order.to_line() + "\n")
        self._orders.flush()
        self._child = int(self._answers.readline())
        overdue = threading.Timer(PATIENCE_S, os.kill, (self._child, signal.SIGTERM))
        overdue.start()
        try:
            return int(self._answers.readline())
        finally:
            overdue.cancel()
            self._child = 0

    def close(self) -> None:
        if self._child:
            os.kill(self._child, signal.SIGKILL)
        self._orders.close()
        self._server.wait()
        self._answers.close()


@contextmanager
def working(port: int, cache: Path) -> Iterator[Callable[[float], bool]]:
    """A worker in a thread of this process; yields what waits for its end: whether it ended in so many seconds."""
    thread = threading.Thread(
        target=run_worker,
        args=(f"127.0.0.1:{port}", None, cache, 1),
        kwargs={"name": "worker", "memory_bytes": 1 << 30, "say": lambda line: None},
        daemon=True,
    )

    def ended(seconds: float) -> bool:
        thread.join(seconds)
        return not thread.is_alive()

    with patch.object(leased_task, "Checkpoints", EveryStep):
        thread.start()
        yield ended


def finished_run(run_dir: Path) -> RunSnapshot:
    """A run that came to its end; raises CrashRunFailed for another one."""
    snapshot = RunSnapshot.open(run_dir)
    if not snapshot.state.standing.finished:
        raise CrashRunFailed("the run is not finished")
    return snapshot


@dataclass(frozen=True, slots=True)
class Point:
    """One kill: before or after the effect of this number (from 1) of a run."""

    number: int
    when: When


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a kill. `effect`: where it was; empty where the run ended before it came to that number.

    `leased_again`: tasks whose lease did not outlive the kill.
    """

    number: int
    when: When
    effect: str
    digest: str
    seconds: float
    leased_again: int = 0
    error: str = ""


class CrashPoints:
    """The recorded run and the killed ones, in `folder`."""

    def __init__(self, folder: Path, coordinators: Coordinators, *, reshard: bool = False) -> None:
        self._folder, self._coordinators = folder, coordinators
        config = small_config(folder, reshard=reshard)
        (folder / "config.json").write_text(config.model_dump_json(), encoding="utf-8")
        self.effects: list[str] = []
        self.digest = ""

    def record(self) -> None:
        """The undisturbed run: its effects in order, and its digest."""
        outcome, self.effects = self._run(None)
        if outcome.error:
            raise CrashRunFailed(outcome.error)
        self.digest = outcome.digest

    def points(self, every: int = 1) -> list[Point]:
        """Every `every`-th of all points of the recorded run."""
        numbers = range(1, len(self.effects) + 1)
        return [Point(number, when) for number in numbers for when in get_args(When)][::every]

    def kill_at(self, point: Point) -> Outcome:
        return self._run(point)[0]

    def _run(self, point: Point | None) -> tuple[Outcome, list[str]]:
        name = "recorded" if point is None else f"{point.number}-{point.when}"
        run_dir, begin = self._folder / name, time.monotonic()
        shutil.rmtree(run_dir, ignore_errors=True)
        run_dir.mkdir()
        killed, digest, leased_again, error = False, "", 0, ""
        effects: list[str] = []
        try:
            killed, effects = self._lives(run_dir, point)
            finished = finished_run(run_dir)
            digest = run_digest(finished, everything=True)
            leased_again = sum(max(0, task.fence - 1) for task in finished.state.tasks.values())
        except (CrashRunFailed, ValueError) as failure:
            error = str(failure)
        if not error:
            shutil.rmtree(run_dir)
        point = point or Point(0, "before")
        reached = effects[point.number - 1] if killed else ""
        seconds = time.monotonic() - begin
        return Outcome(point.number, point.when, reached, digest, seconds, leased_again, error), effects

    def _lives(self, run_dir: Path, point: Point | None) -> tuple[bool, list[str]]:
        """Start coordinators until one ends well, with one worker all the while.

        Whether the first was killed, and its effects up to then.
        """
        order = Order(str(run_dir), free_port(), str(run_dir / "effects.txt"))
        first = order if point is None else replace(order, stop_at=point.number, when=point.when)
        with working(order.port, run_dir / "worker") as ended:
            code = self._coordinators.live(first)
            killed = code == -signal.SIGKILL
            effects = (run_dir / "effects.txt").read_text().splitlines()
            for _ in range(LIVES):
                if code != -signal.SIGKILL:
                    break
                code = self._coordinators.live(replace(order, effects=f"{order.effects}.restart"))
            if code != 0:
                raise CrashRunFailed(f"the coordinator ended with {code}; see {run_dir}.log")
            if not ended(PATIENCE_S):
                raise CrashRunFailed("the worker was not told that the run is over")
        return killed, effects


def earlier_results(path: Path) -> dict[Point, dict[str, Any]]:
    """What an earlier call found; a line that it did not come to finish, and a point without a digest, do not count."""
    if not path.exists():
        return {}
    found: dict[Point, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            outcome = json.loads(line)
            found[Point(outcome["number"], outcome["when"])] = outcome
    return {point: outcome for point, outcome in found.items() if not outcome["error"]}


def check_same_run(folder: Path, digest: str) -> None:
    """Raises CrashRunFailed where the results in `folder` are those of a run that came to other bits."""
    kept = folder / "digest"
    if kept.exists() and kept.read_text(encoding="utf-8") != digest:
        raise CrashRunFailed(f"{folder} holds results of another version, whose run ended with other bits; empty it")
    kept.write_text(digest, encoding="utf-8")


def carry_out(folder: Path, every: int, reshard: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """All chosen points that have no result yet; a summary of them all."""
    coordinators = Coordinators()
    try:
        crash_points = CrashPoints(folder, coordinators, reshard=reshard)
        crash_points.record()
        check_same_run(folder, crash_points.digest)
        unsynced = [effect for effect in crash_points.effects if effect.endswith(" UNSYNCED")]
        points = crash_points.points(every)
        say(f"{len(crash_points.effects)} durable effects, {len(points)} points chosen, digest {crash_points.digest}")
        known = earlier_results(folder / "results.jsonl")
        with (folder / "results.jsonl").open("a", encoding="utf-8") as results:
            results.write("\n")  # behind what an interrupted call may have left
            for point in points:
                if point in known:
                    continue
                outcome = crash_points.kill_at(point)
                known[point] = asdict(outcome)
                results.write(json.dumps(known[point]) + "\n")
                results.flush()
                verdict = "same" if outcome.digest == crash_points.digest else f"DIFFERENT {outcome.error}"
                where = outcome.effect or "not reached"
                say(f"{point.when} {point.number}: {verdict}, {outcome.seconds:.1f} s ({where})")
    finally:
        coordinators.close()
    return _summary(crash_points, [known[point] for point in points], unsynced)


def _summary(crash_points: CrashPoints, outcomes: list[dict[str, Any]], unsynced: list[str]) -> dict[str, Any]:
    return {
        "effects": len(crash_points.effects),
        "points": len(outcomes),
        "not_reached": sum(not outcome["effect"] for outcome in outcomes),
        "leased_again": sum(outcome["leased_again"] for outcome in outcomes),
        "same_digest": sum(outcome["digest"] == crash_points.digest for outcome in outcomes),
        "different": [outcome for outcome in outcomes if outcome["digest"] != crash_points.digest],
        "renamed_before_synced": unsynced,
        "digest": crash_points.digest,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every N-th point")
    parser.add_argument("--reshard", action="store_true", help="a run with a re-shard between its phases")
    parser.add_argument("--dir", type=Path, help="keep runs and results here, and go on with those that are there")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON, progress to standard error")
    arguments = parser.parse_args()
    folder = (arguments.dir or Path(tempfile.mkdtemp(prefix="dipaco-crash-points-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        summary = carry_out(
            folder, arguments.every, arguments.reshard, lambda line: print(line, file=sys.stderr, flush=True)
        )
    except CrashRunFailed as failure:
        print(failure, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"stopped; --dir {folder} goes on from here", file=sys.stderr)
        return 130
    if arguments.json:
        print(json.dumps(summary, indent=2))
    else:
        print(
            f"{summary['same_digest']} of {summary['points']} crash points end with the digest of the undisturbed run "
            f"({summary['effects']} durable effects, {summary['not_reached']} points not reached)"
        )
    return 0 if not summary["different"] and not summary["renamed_before_synced"] else 1


if __name__ == "__main__":
    sys.exit(main())
