from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from configs.corpus import InstalledSource
from corpus import installed
from corpus.documents import Document

CHARACTERS = 60_000


@cache
def _documents() -> tuple[Document, ...]:
    source = InstalledSource(characters_per_domain=CHARACTERS)
    return tuple(installed.documents(source, lambda text: len(text) >= 200))


def test_every_domain_is_filled_from_this_machine_and_not_beyond() -> None:
    characters = Counter[str]()
    for document in _documents():
        characters[document.domain] += len(document.text)
    assert set(characters) == set(installed.DOMAINS)
    assert all(CHARACTERS <= count <= CHARACTERS + 20_001 for count in characters.values())


def test_documents_are_bounded_grouped_by_file_and_name_no_place() -> None:
    for document in _documents():
        assert len(document.text) <= 20_001
        assert document.group is not None
        assert not document.group.startswith("/")
    prefix = str(Path(installed.__file__).parents[1])
    assert not any(prefix in document.text or prefix in document.source for document in _documents())


def test_the_same_machine_gives_the_same_documents() -> None:
    again = tuple(installed.documents(InstalledSource(characters_per_domain=CHARACTERS), lambda text: len(text) >= 200))
    assert again == _documents()


def test_domains_take_turns() -> None:
    first = [document.domain for document in _documents()[:40]]
    assert len(set(first)) == len(installed.DOMAINS)


def test_no_more_is_read_than_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    whole = Path.read_bytes

    def counted(path: Path) -> bytes:
        read.append(path)
        return whole(path)

    monkeypatch.setattr(Path, "read_bytes", counted)
    kept = sum(1 for _ in installed.documents(InstalledSource(characters_per_domain=5_000), lambda text: True))
    assert kept > 0
    assert len(read) < 400 < sum(map(len, installed.candidates().values()))


def test_what_is_refused_does_not_count() -> None:
    refused: list[str] = []

    def keep(text: str) -> bool:
        if "import" in text:
            refused.append(text)
        return "import" not in text

    kept = [
        each
        for each in installed.documents(InstalledSource(characters_per_domain=5_000), keep)
        if each.domain == "python"
    ]
    assert refused
    assert sum(len(document.text) for document in kept) >= 5_000


@pytest.mark.parametrize(
    ("name", "domains"),
    [
        ("torch/torch/nn/functional.py", ("python", "prose")),
        ("torch/torch/include/ATen/ATen.h", ("cpp",)),
        ("numpy/numpy/__init__.pyi", ("stubs",)),
        ("scipy/scipy/x.pyx", ("cython",)),
        ("torch/torchgen/native_functions.yaml", ("configs",)),
        ("numpy/numpy.dist-info/METADATA", ("prose",)),
        ("numpy/numpy.dist-info/licenses/LICENSE.txt", ("licenses",)),
        ("numpy/numpy.dist-info/licenses/numpy/random/README.md", ("licenses",)),
        ("x/pip/_internal/licenses.py", ("python", "prose")),
        ("numpy/numpy.dist-info/RECORD", ()),
        ("x/x.dist-info/sbom.json", ()),
        ("x/x/library.so", ()),
        ("python/pydoc_data/topics.py", ("prose",)),
        ("python/LICENSE.txt", ("licenses",)),
    ],
)
def test_the_name_of_a_file_decides_its_domains(name: str, domains: tuple[str, ...]) -> None:
    assert installed._domains_of(name) == domains


def test_an_upgrade_does_not_rename_metadata() -> None:
    assert installed._unversioned("numpy-2.4.6.dist-info/METADATA") == "numpy.dist-info/METADATA"
    assert installed._unversioned("a/b-1.dist-info.py") == "a/b-1.dist-info.py"


def test_versions_name_python_and_the_packages_but_not_ours() -> None:
    versions = installed.source_versions()
    assert {"python", "torch", "numpy"} <= set(versions)
    assert "dipaco" not in versions


def test_prompts_are_our_own_and_long_enough_to_be_routed() -> None:
    texts = [document.text for document in _documents()]
    for prompt in installed.EXAMPLE_PROMPTS.values():
        assert len(prompt) >= 120
        assert not any(prompt[:100] in text for text in texts)
