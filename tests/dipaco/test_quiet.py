"""What fails under gRPC reaches a person as one sentence: its own log is off unless it was asked for."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dipaco.__main__ import main
from protocol.certificates import write_certificates
from protocol.security import CERTS_DIR, JOIN_FILE, load_security
from tests.loopback import BookHandlers, Loopback

REPOSITORY = Path(__file__).resolve().parents[2]


def dipaco(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "GRPC_VERBOSITY"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "dipaco", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[Loopback]:
    write_certificates(tmp_path / CERTS_DIR, ["alpha"])
    with Loopback(BookHandlers(tmp_path), load_security(tmp_path)) as running:
        yield running


def test_a_coordinator_of_another_ca_is_one_sentence(secured: Loopback, tmp_path: Path) -> None:
    write_certificates(tmp_path / "other", ["alpha"])
    done = dipaco("status", str(secured.address), "--join", str(tmp_path / "other" / JOIN_FILE))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "is not signed by the CA of the join file" in done.stderr


def test_a_port_that_is_taken_is_one_sentence(tiny_config: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = dipaco("coordinator", str(tiny_config), "--run-dir", "run", "--listen", address)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("dipaco: ")


def test_who_wants_the_log_of_grpc_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPC_VERBOSITY", "INFO")
    monkeypatch.setattr(sys, "argv", ["dipaco", "--help"])
    with pytest.raises(SystemExit):
        main()
    assert os.environ["GRPC_VERBOSITY"] == "INFO"
