from __future__ import annotations

import json
from pathlib import Path

import pytest

from dipaco.asking import StatusSource, address_to_ask, plain
from dipaco.ending import Refused
from protocol.certificates import write_certificates
from protocol.security import JOIN_FILE


def test_what_is_not_a_number_becomes_null() -> None:
    status = {"losses": {"0.0": float("nan")}, "workers": [{"loss": float("inf"), "steps": 3}], "eta_s": 1.5}
    assert plain(status) == {"losses": {"0.0": None}, "workers": [{"loss": None, "steps": 3}], "eta_s": 1.5}
    json.dumps(plain(status), allow_nan=False)


def test_nobody_there_is_no_status_and_no_error() -> None:
    with StatusSource() as source:
        assert source.ask("127.0.0.1:1") is None


def test_the_join_file_may_name_the_address(tmp_path: Path) -> None:
    write_certificates(tmp_path / "known", ["alpha"], address="alpha:7070")
    write_certificates(tmp_path / "unknown", ["alpha"])
    assert address_to_ask(None, tmp_path / "known" / JOIN_FILE) == "alpha:7070"
    assert address_to_ask("beta:1", tmp_path / "known" / JOIN_FILE) == "beta:1"
    assert address_to_ask("beta:1", None) == "beta:1"
    for join in (None, tmp_path / "unknown" / JOIN_FILE):
        with pytest.raises(Refused, match="no address of a coordinator: give HOST:PORT"):
            address_to_ask(None, join)
