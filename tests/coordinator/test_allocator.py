"""Free memory goes back where the C library can return it."""

from __future__ import annotations

import platform

import psutil
import pytest

from coordinator.allocator import give_back


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps its memory in another way")
def test_pages_between_what_is_in_use_go_back() -> None:
    """Every second of many small blocks is freed: without help none of that leaves the process."""
    blocks = [bytes(60_000) for _ in range(2000)]
    process = psutil.Process()
    del blocks[::2]
    before = process.memory_info().rss
    assert give_back()
    assert before - process.memory_info().rss > 30_000_000
