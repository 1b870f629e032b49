"""Thousands of connections that say nothing: bounded memory and files, and a run that does not notice."""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.descriptors import max_connections, raise_open_files
from protocol.address import parse_address
from scripts.fuzz_sockets import PREFACE, SETTINGS
from scripts.fuzz_target import Target, undisturbed_digest

PHASES, SILENT = 3, 1000
SILENT_BYTES = 64 * 1024**2
PATIENCE_S = 60.0
pytestmark = pytest.mark.skipif(
    sys.platform == "win32" or raise_open_files() < SILENT + 200, reason="this process may not open enough files"
)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    return undisturbed_digest(tmp_path_factory.mktemp("undisturbed"), PHASES)


@contextlib.contextmanager
def silent(address: str, count: int, words: bytes = b"") -> Iterator[list[socket.socket]]:
    """So many connections that say only this."""
    target = parse_address(address)
    with contextlib.ExitStack() as opened:
        connections = []
        for _ in range(count):
            connections.append(opened.enter_context(socket.create_connection((target.host, target.port), PATIENCE_S)))
            with contextlib.suppress(OSError):
                connections[-1].sendall(words)
        yield connections


def hung_up(connection: socket.socket) -> bool:
    """Whether the other side has closed it."""
    connection.settimeout(0.01)
    try:
        while connection.recv(4096):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


def eventually(target: Target, most_files: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while target.memory()[1] > most_files:
        assert time.monotonic() < deadline, f"{target.memory()[1]} files are open, expected at most {most_files}"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_thousand_of_each_kind_disturb_nothing(tmp_path: Path, expected: str) -> None:
    with Target(tmp_path, PHASES).running() as target:
        over: list[bool] = []
        worker = target.honest_worker(lambda: 1.0 if over else 0.4)
        resident, files = target.memory()
        for words in (b"", PREFACE + SETTINGS):
            with silent(target.address, SILENT, words):
                deadline = time.monotonic() + PATIENCE_S
                while target.memory()[1] < files + SILENT // 2:
                    assert time.monotonic() < deadline, "the connections are not taken"
                    time.sleep(0.05)
                assert target.memory()[0] < resident + SILENT_BYTES
            eventually(target, files + 20)
        over.append(True)
        assert target.digest(worker) == expected
        assert target.complaint() == ""


def test_a_coordinator_with_few_files_keeps_those_it_needs(tmp_path: Path, expected: str) -> None:
    """Where a thousand connections would use up its files, it takes only as many as leave the run its own."""
    few = 256
    with Target(tmp_path, PHASES, open_files=few).running() as target:
        over: list[bool] = []
        worker = target.honest_worker(lambda: 1.0 if over else 0.2)
        while not any(target.run_dir.glob("spool/*")):
            assert worker.is_alive()
            time.sleep(0.02)
        with silent(target.address, SILENT) as connections:
            deadline = time.monotonic() + PATIENCE_S
            while sum(map(hung_up, connections)) < SILENT - max_connections(few):
                assert time.monotonic() < deadline, "connections beyond the most are kept"
            assert target.memory()[1] < few
            over.append(True)
            assert target.digest(worker) == expected
        assert target.complaint() == ""
