"""A run whose disk is full, its log with it, with real processes: it waits, says so to who asks, and goes on by itself.

It comes to the same digest.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

PATIENCE_S = 240.0
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def dipaco(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "dipaco", *map(str, words)]


def wait_for(condition: Callable[[], Any], log: Path) -> Any:
    until = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.05)
    return found


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB of its own, where the machine lets one be made."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", disk], capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def fill(disk: Path, leave: int) -> Path:
    """A file that leaves so many bytes."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - leave)
    return ballast


@pytest.mark.slow
@pytest.mark.parametrize(("low_bytes", "leave"), [(4_000_000, 1_000_000), (0, 0)], ids=["limit", "to the last byte"])
def test_a_run_waits_for_room_and_goes_on_by_itself(
    tmp_path: Path, small_disk: Path, prepare_tiny: Callable[[Path], Path], low_bytes: int, leave: int
) -> None:
    config = prepare_tiny(tmp_path)
    document = yaml.safe_load(config.read_text())
    document["execution"]["low_disk_bytes"] = low_bytes
    config.write_text(yaml.safe_dump(document))
    run_dir, log = small_disk / "run", small_disk / "log"
    with log.open("wb") as out:
        start = functools.partial(subprocess.Popen[bytes], cwd=tmp_path, stdout=out, stderr=out, env=ENVIRONMENT)
        started = [start(dipaco("coordinator", config, "--run-dir", run_dir, "--listen", "127.0.0.1:0"))]
        try:
            told = run_dir / "address"
            address = wait_for(lambda: told.exists() and told.read_text().strip(), log)
            started.append(start(dipaco("worker", address, "--cache-dir", tmp_path / "cache")))
            wait_for(lambda: b"pretrain/TRAIN/0" in log.read_bytes(), log)
            ballast = fill(small_disk, leave)
            wait_for(lambda: waiting(address).startswith("waiting for room: "), log)
            if leave:
                assert b"waiting for room: " in log.read_bytes()
            time.sleep(4.0)  # more than a lease lasts
            assert [process.poll() for process in started] == [None, None], log.read_text()
            ballast.unlink()
            freed_s = time.monotonic()
            wait_for(lambda: b"there is room again; the run goes on" in log.read_bytes(), log)
            assert time.monotonic() - freed_s < 15.0  # a busy machine
            assert started[0].wait(PATIENCE_S) == 0, log.read_text()
        finally:
            for process in started:
                process.kill()
                process.wait()
    assert "failed:" not in log.read_text()
    assert "ran out" not in log.read_text()
    digests = [
        subprocess.run(dipaco("digest", each, "--all"), cwd=tmp_path, env=ENVIRONMENT, capture_output=True, check=True)
        for each in (run_dir, undisturbed(tmp_path, config))
    ]
    assert digests[0].stdout == digests[1].stdout


def waiting(address: str) -> str:
    """What the coordinator waits for."""
    asked = subprocess.check_output(dipaco("status", address, "--json"), env=ENVIRONMENT)
    return str(json.loads(asked)["waiting"])


def undisturbed(folder: Path, config: Path) -> Path:
    subprocess.run(
        dipaco("run", config, "--workers", "1", "--run-dir", folder / "other", "--json"),
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        check=True,
    )
    return folder / "other"
