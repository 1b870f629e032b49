"""The committed stubs are those of the .proto, and every field of it says what it holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

grpc_tools = pytest.importorskip("grpc_tools", reason="the stubs can be made with the extra `dev` only")

from scripts.generate_stubs import ROOT, drifted, generate  # noqa: E402


def test_the_committed_stubs_are_those_of_the_proto(tmp_path: Path) -> None:
    assert drifted(generate(tmp_path)) == [], "run python scripts/generate_stubs.py"


def test_drift_is_noticed(tmp_path: Path) -> None:
    stubs = generate(tmp_path)
    stubs["dipaco_pb2.pyi"] += b"# changed\n"
    assert drifted(stubs) == ["dipaco_pb2.pyi"]


@pytest.mark.parametrize(("proto", "at_least"), [("dipaco", 30), ("inference", 20)])
def test_every_field_has_a_comment(proto: str, at_least: int) -> None:
    lines = (ROOT / "protocol" / f"{proto}.proto").read_text(encoding="utf-8").splitlines()
    fields = [line for line in lines if re.match(r"  (repeated |optional )?\w+ \w+ = \d+;", line)]
    assert len(fields) > at_least
    assert [line for line in fields if not re.search(r"; *// \S", line)] == []
