"""The coordinator's peak memory with 256 paths against 16 of the same total module bytes.

Carries out configs/tests/many-paths-16x16.yaml and -4x4.yaml, one phase each, with two workers, and prints the highest
resident memory of each coordinator. Fails where the two differ by more than 50 MB.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from pathlib import Path

import psutil

from dipaco.processes import LocalRun

ROOT = Path(__file__).resolve().parent.parent
LIMIT_MB = 50.0


def peak_mb(config: Path, run_dir: Path) -> tuple[float, float]:
    """Highest resident memory of the coordinator in MB, and the wall time in seconds, of one run."""
    local = LocalRun(config, run_dir, 2, 1, psutil.virtual_memory().available // 4, say=print)
    began, peak = time.monotonic(), 0
    try:
        local.start()
        while not local.watch():
            with contextlib.suppress(psutil.NoSuchProcess):
                peak = max(peak, psutil.Process(local.coordinator.pid).memory_info().rss)
            time.sleep(0.05)
    finally:
        local.stop()
    return peak / 1e6, time.monotonic() - began


def main() -> int:
    found = {}
    for grid in ("16x16", "4x4"):
        with tempfile.TemporaryDirectory(prefix="dipaco-many-paths-") as scratch:
            peak, seconds = peak_mb(ROOT / "configs" / "tests" / f"many-paths-{grid}.yaml", Path(scratch))
        found[grid] = peak
        print(f"many-paths-{grid}: coordinator peak {peak:.0f} MB, {seconds:.0f} s", flush=True)
    difference = abs(found["16x16"] - found["4x4"])
    print(f"difference {difference:.0f} MB (limit {LIMIT_MB:.0f} MB)")
    return 0 if difference <= LIMIT_MB else 1


if __name__ == "__main__":
    sys.exit(main())
