"""What a run has cost on this machine so far, over all the times it was started: RUN/usage.json."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from dipaco.ending import no_room_at
from model.store import write_whole


@dataclass(frozen=True, slots=True)
class Usage:
    """Wall time in seconds, and the highest memory of all processes together in bytes."""

    wall_s: float = 0.0
    peak_bytes: int = 0
    workers: int = 0
    starts: int = 0

    def and_then(self, wall_s: float, peak_bytes: int, workers: int) -> Usage:
        """With one more start of the run."""
        return Usage(self.wall_s + wall_s, max(self.peak_bytes, peak_bytes), workers, self.starts + 1)


def read_usage(run_dir: Path) -> Usage:
    """What was kept; nothing where the run was never started by `dipaco run`."""
    try:
        return Usage(**json.loads((run_dir / "usage.json").read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return Usage()


def write_usage(run_dir: Path, usage: Usage) -> None:
    """Keep it, complete or not at all."""
    path = run_dir / "usage.json"
    with no_room_at(path):
        write_whole(path, json.dumps(asdict(usage)) + "\n")


def hardware() -> dict[str, Any]:
    """The machine a measurement was taken on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            found = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        found = ""
    return found or platform.processor() or platform.machine()
