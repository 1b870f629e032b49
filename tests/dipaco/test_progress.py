from __future__ import annotations

import copy
from typing import Any

import pytest
from rich.console import Console

from dipaco.progress import PlainLines, duration, panel, summary

STATUS: dict[str, Any] = {
    "run": "quickstart",
    "stage": "train, dense",
    "stages": [
        {"name": "corpus", "kind": "corpus", "status": "done", "done": 9, "total": 9, "started_s": 1.0, "seconds": 4.5},
        {"name": "train", "kind": "train", "status": "running", "done": 50, "total": 200, "started_s": 9, "seconds": 0},
    ],
    "phase": 3,
    "num_phases": 12,
    "workers": [
        {"name": "worker-0", "task": "train/TRAIN/3/1", "steps": 7, "steps_total": 50, "loss": 3.25}
        | {"tokens_per_s": 4000.0, "last_seen_s": 0.1},
        {"name": "worker-1", "task": "", "steps": 0, "steps_total": 0, "loss": None}
        | {"tokens_per_s": 900.0, "last_seen_s": 0.2},
    ],
    "tasks": {"ready": 1, "leased": 1, "done": 60},
    "losses": {"0.0": 3.5, "0.1": 3.625},
    "baseline_losses": {"dense": 4.125},
    "tokens": 1_000_000,
    "steps": 500,
    "bytes": {"modules": 2_000_000, "outer_gradients": 1_000_000, "inner_state": 3_000_000, "other": 500_000},
    "eta_s": 125.0,
    "finished": False,
    "paused": "",
}


def test_a_line_tells_stage_phase_losses_speed_bytes_and_time_left() -> None:
    assert summary(STATUS) == (
        "train 50/200 | phase 3/12 | loss 0.0=3.500 0.1=3.625 | dense=4.125 | 4,000 tokens/s | 6.5 MB moved | "
        "1/2 workers busy | about 2 min 05 s of training left"
    )


def test_a_pause_is_told_with_its_reason() -> None:
    assert summary({**STATUS, "paused": "the disk is full"}).endswith("PAUSED: the disk is full")


def test_the_panel_shows_the_same_and_who_holds_what() -> None:
    console = Console(width=120, record=True, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: SIM115
    with console.file:
        console.print(panel(STATUS))
        text = console.export_text()
    for part in ("quickstart: train, dense, phase 3 of 12", "50/200", "worker-0", "train/TRAIN/3/1", "7/50", "waiting"):
        assert part in text
    for part in ("0.1: 3.625", "dense: 4.125", "4,000 tokens/s", "outer gradients 1.0 MB", "2 min 05 s"):
        assert part in text


def test_lines_come_when_something_begins(capsys: pytest.CaptureFixture[str]) -> None:
    later = copy.deepcopy(STATUS) | {"phase": 4}
    with PlainLines(period_s=1e9) as lines:
        for status in (STATUS, STATUS, later, later):
            lines.show(status)
    out = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1] for line in out] == ["phase 3/12", "phase 4/12"]


@pytest.mark.parametrize(("seconds", "words"), [(12.4, "12 s"), (125, "2 min 05 s"), (7260, "2 h 01 min")])
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words
