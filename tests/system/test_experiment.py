"""The experiment as a person starts it: real runs, stopped in the middle and continued, and results at the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.scripts.tables import DENSE, tiny_table

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "experiment_paths.py"
INSIDE = {"baselines": [{"name": "dense"}]}


def small_table() -> dict[str, Any]:
    """Dense alone, dense as the baseline of the mixture's run, and the mixture: two runs."""
    table = tiny_table()
    del table["tune"], table["headline"], table["budgets"]
    table["seeds"] = [0]
    table["experiment"]["evaluation"]["max_sequences"] = 40
    table["cloze"] = {"items": 24, "context_tokens": 32, "ending_tokens": 8}
    table["rows"] = [
        {"name": "dense", "label": "dense", "compute": "1x", "overrides": DENSE},
        {"name": "inside", "label": "dense inside", "compute": "1x", "overrides": INSIDE, "model": "dense"},
        {"name": "kmeans", "label": "k-means", "compute": "4x", "overrides": INSIDE},
    ]
    return table


@pytest.fixture
def command(tmp_path: Path, write_documents: Callable[..., None]) -> list[str]:
    write_documents(tmp_path / "documents.jsonl")
    table = tmp_path / "tiny.yaml"
    table.write_text(yaml.safe_dump(small_table(), sort_keys=False), encoding="utf-8")
    places = ["--data", str(tmp_path), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    return [sys.executable, str(SCRIPT), str(table), *places, "--workers", "2"]


def interrupted(command: list[str], begun: Callable[[], bool]) -> int:
    """SIGINT as soon as something has begun; the exit code."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 120
    while not begun():
        assert time.monotonic() < deadline, "it did not begin"
        assert process.poll() is None, "it ended by itself"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=120)
    return process.returncode


@pytest.mark.slow
def test_a_table_from_nothing_to_results_with_a_stop_between(command: list[str], tmp_path: Path) -> None:
    states = (tmp_path / "work").glob
    assert interrupted(command, lambda: any(states("*/run/state.db"))) == 3
    assert not (tmp_path / "out").exists()
    assert not any(states("*/run.json"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert "cell 2 of 2" in done.stderr
    rows = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    of_row = {(row["row"], row["route"]): row for row in rows}
    kmeans, dense, inside = of_row["kmeans", "sequence"], of_row["dense", "none"], of_row["inside", "none"]
    assert kmeans["ratio_to_dense"] == kmeans["test_perplexity"] / dense["test_perplexity"]
    assert kmeans["test_perplexity"] != kmeans["validation_perplexity"]
    assert kmeans["tokens"] > dense["tokens"]
    assert dense["tokens"] == inside["tokens"]
    assert kmeans["smallest_shard"] > 0
    # Plain training through the system is plain training, bit for bit: alone or beside a mixture.
    assert dense["test_perplexity"] == inside["test_perplexity"]
    assert 0 < dense["cloze_accuracy"] == inside["cloze_accuracy"] < 1
    assert dense["cloze_items"] == inside["cloze_items"] == kmeans["cloze_items"]
    assert kmeans["cloze_by_domain"].keys() == {"recipe", "code", "law"}, "of numbers there are too few documents"
    assert "Every cell of this table is finished." in (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    again = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0
    assert "cell 1" not in again.stderr
