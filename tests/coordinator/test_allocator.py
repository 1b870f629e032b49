"""Freed memory leaves the process where the C library can be told so."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# After one large buffer was freed, others go from between blocks that stay: as glibc is set, their room stays, too.
SCRIPT = """
import psutil
from coordinator.allocator import give_back_large_buffers
assert {set} or give_back_large_buffers()
first = b"x" * 8_000_000
del first
buffers, kept = [], []
for size in range(1_000_000, 200_000, -20_000):
    buffers.append(b"x" * size)
    kept.append(bytearray(10_000))
del buffers
print(psutil.Process().memory_info().rss)
"""


def resident_bytes(*, left_as_it_is: bool) -> int:
    script = SCRIPT.format(set=left_as_it_is)
    return int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps its memory in another way")
def test_what_was_large_goes_back() -> None:
    assert resident_bytes(left_as_it_is=True) - resident_bytes(left_as_it_is=False) > 10_000_000
