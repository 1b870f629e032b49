from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dipaco import shadows

REPOSITORY = Path(__file__).resolve().parents[2]


def test_nothing_shadows_this_checkout() -> None:
    assert shadows.find() is None


def test_a_package_from_elsewhere_is_named_with_both_places(tmp_path: Path) -> None:
    found = shadows.find(("configs",), home=tmp_path)
    assert found is not None
    assert str(REPOSITORY / "configs") in found
    assert str(tmp_path / "configs") in found


def test_a_missing_package_is_named() -> None:
    found = shadows.find(("no_such_package_of_ours",))
    assert found is not None
    assert "'no_such_package_of_ours'" in found


@pytest.mark.parametrize("name", ["model", "configs"])
def test_the_command_refuses_to_start_beside_a_package_of_the_same_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "dipaco", "--help"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"dipaco: package '{name}' is taken from {tmp_path / name}")
    assert len(done.stderr.splitlines()) == 1
