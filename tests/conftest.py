"""What all tests share: shapes in signatures are enforced while testing, and a corpus small enough for seconds."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

# One thread a process, before torch is imported by anything: two are far slower where another process wants a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from beartype import beartype
from beartype.roar import BeartypeDecorHintException
from jaxtyping import install_import_hook

from tests.command_line import dipaco


def _checked(function: Any) -> Any:
    """The function with its arguments and result checked; as it is where beartype cannot check one of its hints."""
    try:
        return beartype(function)
    except BeartypeDecorHintException:
        return function


# The hook takes the checker by name only, and no module of the tests has one that can be imported.
sys.modules["checked_shapes"] = ModuleType("checked_shapes")
sys.modules["checked_shapes"].checked = _checked  # type: ignore[attr-defined]
install_import_hook(("model", "routing", "worker", "inference"), "checked_shapes.checked")

REPOSITORY = Path(__file__).resolve().parent.parent
KINDS = {
    "recipe": "stir the onions with butter until golden then add flour milk salt pepper and simmer gently",
    "code": "def return self value if not None: for item in range(size): result += index [0] (key)",
    "law": "whereas the party hereto shall indemnify any licensee pursuant to clause herein notwithstanding",
    "numbers": "12.5 0.0031 77 x y z 1024 sum mean 3.14 axis rows 99 columns 2.718 vector 42",
}


def _write_documents(path: Path, per_kind: int = 60, words: int = 110) -> None:
    """Documents of four kinds with words of their own, the same ones every time."""
    source = random.Random(0)
    with path.open("w", encoding="utf-8") as lines:
        for number in range(per_kind * len(KINDS)):
            kind = list(KINDS)[number % len(KINDS)]
            text = " ".join(source.choices(KINDS[kind].split(), k=words)) + f" {number}."
            lines.write(json.dumps({"text": text, "domain": kind}) + "\n")


@pytest.fixture(scope="session")
def write_documents() -> Callable[..., None]:
    """Writes documents to a .jsonl file: `write_documents(path, per_kind=60, words=110)`."""
    return _write_documents


@pytest.fixture(scope="session")
def prepare_tiny() -> Callable[[Path], Path]:
    """Puts a copy of configs/tests/tiny.yaml and the documents it reads into a folder; returns the copy."""

    def prepare(folder: Path) -> Path:
        _write_documents(folder / "documents.jsonl")
        return Path(shutil.copy(REPOSITORY / "configs" / "tests" / "tiny.yaml", folder / "tiny.yaml"))

    return prepare


@pytest.fixture(scope="session")
def tiny_run(
    tmp_path_factory: pytest.TempPathFactory, prepare_tiny: Callable[[Path], Path]
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder where two workers carried out tiny.yaml (in runs/tiny), and what the command printed. Only to read."""
    folder = tmp_path_factory.mktemp("tiny-run")
    prepare_tiny(folder)
    return folder, dipaco("run", "tiny.yaml", "--workers", "2", cwd=folder)


@pytest.fixture
def tiny_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepare_tiny: Callable[[Path], Path]) -> Path:
    """A copy of configs/tests/tiny.yaml in the working directory, with the documents that it reads."""
    monkeypatch.chdir(tmp_path)
    return prepare_tiny(tmp_path)
