"""Logs of processes: kept small by the process that writes them, and read as one by the process that started it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from dipaco.own_log import LogTail, rotation

WRITER = """
import os, sys, time
from dipaco import own_log
own_log._PERIOD_S = 0.001
own_log.rotate_own_output(*own_log.rotation(sys.argv[1]))
for number in range(int(sys.argv[2]), int(sys.argv[3])):
    print(f"line {number}", flush=True)
    print(f"line {number} again", file=sys.stderr, flush=True)
    time.sleep(0.0005)
"""


def write(log: Path, first: int, last: int) -> None:
    with log.open("ab") as file:
        command = [sys.executable, "-c", WRITER, f"{log}:4096:50", str(first), str(last)]
        subprocess.run(command, stdout=file, stderr=file, check=True)


def test_no_line_is_lost_while_the_files_change(tmp_path: Path) -> None:
    log = tmp_path / "worker-0.log"
    everything = LogTail(log)
    write(log, 0, 500)
    later = LogTail(log)
    write(log, 500, 1000)
    lines = [text for number in range(1000) for text in (f"line {number}", f"line {number} again")]
    assert everything.read().decode().splitlines() == lines
    assert later.read().decode().splitlines() == lines[1000:]
    assert len(list(tmp_path.iterdir())) > 2


def test_only_so_many_files_are_kept(tmp_path: Path) -> None:
    log = tmp_path / "worker-0.log"
    with log.open("ab") as file:
        command = [sys.executable, "-c", WRITER, f"{log}:4096:3", "0", "1000"]
        subprocess.run(command, stdout=file, stderr=file, check=True)
    assert {path.name for path in tmp_path.iterdir()} == {"worker-0.log", "worker-0.log.1", "worker-0.log.2"}
    newest = [path.read_bytes() for path in (tmp_path / "worker-0.log.1", log)]
    assert b"line 999 again" in b"".join(newest), "the file may have been full just then"


def test_the_rotation_of_a_command_line(tmp_path: Path) -> None:
    assert rotation(f"{tmp_path}/a:b.log:10:2") == (tmp_path / "a:b.log", 10, 2)
