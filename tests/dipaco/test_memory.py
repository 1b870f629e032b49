from __future__ import annotations

import os
import subprocess
import sys
import threading

from dipaco.memory import PeakMemory, tree_bytes


def test_the_memory_of_children_counts() -> None:
    alone = tree_bytes(os.getpid())
    script = "block = bytearray(b'x' * 64_000_000); print('ready', flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        assert tree_bytes(os.getpid()) - alone > 50_000_000
    finally:
        child.communicate(b"\n")


def test_a_process_that_is_gone_has_none() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert tree_bytes(child.pid) == 0


def test_the_peak_is_the_highest_sample() -> None:
    samples, all_taken = iter([3, 9, 4]), threading.Event()

    def measure(root: int) -> int:
        assert root == os.getpid()
        value = next(samples, None)
        if value is None:
            all_taken.set()
            return 0
        return value

    with PeakMemory(period_s=0.001, measure=measure) as memory:
        assert all_taken.wait(10)
    assert memory.peak_bytes == 9
