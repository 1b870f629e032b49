"""The command under real kills: the same bits as the undisturbed run, and a record that adds up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coordinator.journal import Journal

# The run below lasts eight seconds and more on any machine; what is planned for later does not happen on a fast one.
PLAN: list[dict[str, Any]] = [
    {"at_s": 0.0, "process": "worker-0", "action": "start"},
    {"at_s": 0.0, "process": "worker-1", "action": "start"},
    {"at_s": 3.0, "process": "worker-0", "action": "kill"},
    {"at_s": 3.2, "process": "worker-0", "action": "start"},
    {"at_s": 4.0, "process": "coordinator", "action": "kill"},
    {"at_s": 4.5, "process": "coordinator", "action": "start"},
    {"at_s": 7.0, "process": "worker-1", "action": "stop"},
    {"at_s": 11.0, "process": "worker-0", "action": "terminate"},
    {"at_s": 12.0, "process": "worker-0", "action": "start"},
    {"at_s": 13.0, "process": "worker-1", "action": "continue"},
]


@pytest.fixture
def longer_run(tmp_path: Path, prepare_tiny: Callable[[Path], Path]) -> Path:
    """A folder with tiny.yaml trained for longer, so that faults find it at work."""
    config = prepare_tiny(tmp_path)
    text = config.read_text(encoding="utf-8")
    longer = text.replace("phases: 2, inner_steps: 5", "phases: 12, inner_steps: 20")
    assert longer != text
    config.write_text(longer, encoding="utf-8")
    return tmp_path


def simulated(folder: Path, plan: list[dict[str, Any]]) -> dict[str, Any]:
    """What `dipaco simulate --compare --json` says of tiny.yaml in this folder under the lines of a plan."""
    (folder / "faults.txt").write_text("".join(json.dumps(line) + "\n" for line in plan), encoding="utf-8")
    words = ["simulate", "tiny.yaml", "--workers", "2", "--preempt", "plan:faults.txt", "--compare", "--run-dir", "run"]
    done = subprocess.run(
        [sys.executable, "-m", "dipaco", *words, "--json"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    outcome: dict[str, Any] = json.loads(done.stdout)
    return outcome


def test_a_simulation_ends_with_the_bits_of_the_undisturbed_run(longer_run: Path) -> None:
    outcome = simulated(longer_run, PLAN)
    assert outcome == json.loads((longer_run / "run" / "simulation.json").read_text())
    assert outcome["digest"] == outcome["reference_digest"]
    assert outcome["digest_equal"] is True
    assert (outcome["worker_kills"], outcome["coordinator_kills"], outcome["unplanned_ends"]) == (1, 1, 0)
    journal = Journal(longer_run / "run", read_only=True)
    trained = sum(metric["steps"] for metric in journal.metrics() if metric["kind"] == "TRAIN")
    journal.close()
    assert outcome["steps_in_weights"] == trained > 0
    assert outcome["steps_executed"] >= trained
    replayed = (longer_run / "run" / "plan.jsonl").read_text().splitlines()
    assert len(replayed) == len(PLAN)
    assert (longer_run / "run" / "simulation.html").is_file()


BAD_NETWORK: list[dict[str, Any]] = [
    {"network": "latency=0.01,jitter=0.005,rate=20Mbit,loss=0.01", "seed": 2},
    *({"at_s": 0.0, "process": f"worker-{index}", "action": "start"} for index in (0, 1)),
    {"at_s": 6.0, "process": "worker-0", "action": "drop"},
    {"at_s": 7.0, "process": "worker-1", "action": "part"},
    {"at_s": 8.0, "process": "worker-0", "action": "drop"},
    {"at_s": 9.0, "process": "coordinator", "action": "kill"},
    {"at_s": 9.5, "process": "coordinator", "action": "start"},
    {"at_s": 11.0, "process": "worker-1", "action": "heal"},
    *({"at_s": at_s, "process": "worker-0", "action": "drop"} for at_s in (12.0, 14.0)),
]


@pytest.mark.slow
def test_a_bad_network_changes_no_bit_and_is_replayed(longer_run: Path) -> None:
    outcome = simulated(longer_run, BAD_NETWORK)
    assert outcome["digest_equal"] is True
    network = outcome["network"]
    assert network["spec"] == "latency=0.01,jitter=0.005,rate=20000000,loss=0.01"
    assert network["drops"] >= 2
    assert network["partitions"] == 1
    assert network["cut_connections"] >= 1
    assert network["stalled_bytes"] > 0
    assert "latency=0.01" in (longer_run / "run" / "simulation.html").read_text()
    written = [json.loads(line) for line in (longer_run / "run" / "plan.jsonl").read_text().splitlines()]
    assert [line.get("action") for line in written] == [line.get("action") for line in BAD_NETWORK]
    assert written[0] == {"network": network["spec"], "seed": 2}


@pytest.mark.parametrize("more", [["--network", "latency=1h"], ["--network", "latency=1", "--virtual", "nowhere"]])
def test_a_network_that_cannot_be_had_is_one_sentence(
    more: list[str], tmp_path: Path, prepare_tiny: Callable[[Path], Path]
) -> None:
    prepare_tiny(tmp_path)
    words = ["simulate", "tiny.yaml", "--preempt", "poisson:mtbf=60,restart=1", *more]
    done = subprocess.run(
        [sys.executable, "-m", "dipaco", *words], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "network" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_run_that_is_no_simulation_is_left_alone(tmp_path: Path, prepare_tiny: Callable[[Path], Path]) -> None:
    prepare_tiny(tmp_path)
    (tmp_path / "none").write_text("", encoding="utf-8")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.db").write_text("precious", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "dipaco", "simulate", "tiny.yaml", "--preempt", "plan:none", "--run-dir", "run"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "holds a run that is no simulation" in done.stderr
    assert (tmp_path / "run" / "state.db").read_text() == "precious"
