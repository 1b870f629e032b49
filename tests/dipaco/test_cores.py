from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dipaco.commands import app
from dipaco.cores import usable_cores
from dipaco.running import Stopped
from protocol.certificates import write_certificates
from protocol.security import JOIN_FILE


def test_cores_that_this_process_may_not_use_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert usable_cores() == 2


def test_without_that_knowledge_all_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores() == 1


def test_a_worker_offers_them_at_the_address_of_its_join_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("dipaco.cores.usable_cores", lambda: 5)
    monkeypatch.setattr("worker.loop.run_worker", lambda **arguments: given.update(arguments) or 0)
    write_certificates(tmp_path, ["alpha"], address="alpha:7070")
    done = CliRunner().invoke(app, ["worker", "--join", str(tmp_path / JOIN_FILE)])
    assert done.exit_code == 0, done.output
    assert (given["threads"], given["address"]) == (5, "alpha:7070")


def test_a_run_starts_a_worker_for_each(monkeypatch: pytest.MonkeyPatch, tiny_config: Path) -> None:
    started: list[Any] = []

    def stop(local: Any, *_: object) -> None:
        started.append((local.num_workers, local.threads))
        raise Stopped

    monkeypatch.setattr("dipaco.cores.usable_cores", lambda: 6)
    monkeypatch.setattr("dipaco.running.carry_out", stop)
    for given in ([], ["--workers", "2"]):
        done = CliRunner().invoke(app, ["run", str(tiny_config), *given])
        assert done.exit_code == 3, done.output
    assert started == [(6, 1), (2, 3)]
