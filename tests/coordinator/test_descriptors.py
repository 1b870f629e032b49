from __future__ import annotations

import subprocess
import sys

import pytest

from coordinator.descriptors import MAX_STREAMS, MOST_OPEN_FILES, RESERVED, max_connections, raise_open_files

CHILD = """
import resource
from coordinator.descriptors import raise_open_files
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
found = raise_open_files({most})
print(found, resource.getrlimit(resource.RLIMIT_NOFILE)[0], hard)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
@pytest.mark.parametrize("most", [400, 200, MOST_OPEN_FILES])
def test_the_soft_limit_is_raised_and_never_lowered(most: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD.format(most=most)], capture_output=True, text=True, check=True
    ).stdout
    told, now, hard = map(int, done.split())
    assert told == now == max(300, min(most, hard))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_it_is_asked_twice() -> None:
    assert raise_open_files() == raise_open_files() > 0


@pytest.mark.parametrize("limit", [256, 1024, 20_000, MOST_OPEN_FILES])
def test_all_connections_with_all_their_calls_fit_the_limit(limit: int) -> None:
    connections = max_connections(limit)
    assert connections >= 1
    assert connections * (1 + MAX_STREAMS) + RESERVED <= limit
    assert (connections + 1) * (1 + MAX_STREAMS) + RESERVED > limit


def test_somebody_gets_in_whatever_the_limit() -> None:
    assert max_connections(64) == 1
