"""The embedded corpus: text that pip has already put on the machine, found by importlib.metadata and sysconfig.

Domains: prose (docstrings, reST, Markdown, package descriptions, Python's help topics), python (code without its
docstrings), cpp (C++ and CUDA headers), stubs (.pyi), cython, configs (YAML, JSON, CMake, TOML) and licenses. The files
of a domain are taken in the order of a hash of their names until `characters_per_domain` is reached, so no more is read
than is used; where packages are installed does not matter.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import itertools
import os
import platform
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from configs.corpus import InstalledSource
from corpus import extraction
from corpus.documents import BadCorpus, Document, Keep
from corpus.pieces import pieces

EXAMPLE_PROMPTS = {
    "prose": (
        "Return the weighted average of an array along the given axis.\n\nParameters\n----------\n"
        "values : array_like\n    The numbers to average. If this is not an array, a conversion is attempted.\n"
        "axis : int, optional\n    "
    ),
    "python": (
        "import json\nfrom pathlib import Path\n\n\nclass SettingsReader:\n    "
        'def __init__(self, path, encoding="utf-8"):\n        self.path = Path(path)\n'
        "        self.encoding = encoding\n\n    def read(self):\n        "
    ),
    "cpp": (
        "#pragma once\n\n#include <cstdint>\n#include <vector>\n\nnamespace geometry {\n\ntemplate <typename T>\n"
        "class Polygon {\n public:\n  explicit Polygon(std::vector<T> points);\n  "
    ),
    "stubs": (
        "from collections.abc import Callable, Iterator\nfrom typing import Any, overload\n\nclass Cursor:\n"
        "    def __init__(self, name: str, size: int = ...) -> None: ...\n    @property\n    def "
    ),
    "cython": (
        "cimport cython\nfrom libc.math cimport sqrt\n\n@cython.boundscheck(False)\n@cython.wraparound(False)\n"
        "cdef double distance(const double[:] left, const double[:] right) noexcept nogil:\n    cdef Py_ssize_t i\n    "
    ),
    "configs": (
        "- func: clamp_range(Tensor self, Scalar low, Scalar high) -> Tensor\n  variants: function, method\n"
        "  dispatch:\n    CPU: clamp_range_cpu\n    "
    ),
    "licenses": (
        "Permission to use, copy, modify and distribute this library for any purpose is hereby granted, provided that "
        "the above notice appears in all copies. THE LIBRARY IS PROVIDED "
    ),
}
"""Openings in the manner of each domain, written for demonstration; none is part of the corpus."""

DOMAINS = tuple(EXAMPLE_PROMPTS)
_SUFFIXES = {
    ".py": ("python", "prose"),
    ".rst": ("prose",),
    ".md": ("prose",),
    ".h": ("cpp",),
    ".hpp": ("cpp",),
    ".cuh": ("cpp",),
    ".pyi": ("stubs",),
    ".pyx": ("cython",),
    ".pxd": ("cython",),
    ".pxi": ("cython",),
    ".yaml": ("configs",),
    ".yml": ("configs",),
    ".json": ("configs",),
    ".toml": ("configs",),
    ".cmake": ("configs",),
}
_LICENSE = re.compile(r"(^|[-_./])(licen[sc]es?|copying|notices?)([-_.]|$)", re.IGNORECASE)
_NOT_TEXT = frozenset({".py", ".pyc", ".pyi", ".h", ".so", ".json"})
_PASSED_OVER = frozenset({"test", "tests", "site-packages", "dist-packages", "__pycache__", "lib2to3"})
_SHARE_OF_ONE_FILE = 20
_OWN_DISTRIBUTION = "dipaco"
_HELP_TOPICS = "python/pydoc_data/topics.py"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A file that may give text to a domain. `name` is the same wherever it is installed, and decides its turn."""

    domain: str
    name: str
    path: Path

    @property
    def turn(self) -> bytes:
        return hashlib.sha256(f"{self.domain}\0{self.name}".encode()).digest()


def source_versions() -> dict[str, str]:
    """The packages that the text is taken from, with their versions; the text changes with them."""
    return {"python": platform.python_version()} | {
        distribution.metadata["Name"]: distribution.version for distribution in _distributions()
    }


def documents(source: InstalledSource, keep: Keep) -> Iterator[Document]:
    """The documents that `keep` accepts, one file of each domain in turn, up to `characters_per_domain` each."""
    found = candidates()
    if not found:
        raise BadCorpus("no installed package has text to read; use corpus.source.kind 'files'")
    streams = [_domain(found.get(domain, []), source.characters_per_domain, keep) for domain in DOMAINS]
    for turn in itertools.zip_longest(*streams, fillvalue=()):
        yield from itertools.chain.from_iterable(turn)


def candidates() -> dict[str, list[Candidate]]:
    """All files that may give text, by domain, in the order in which they are taken."""
    found: dict[str, list[Candidate]] = {}
    for name, path in itertools.chain(_package_files(), _standard_library()):
        for domain in _domains_of(name):
            found.setdefault(domain, []).append(Candidate(domain, name, path))
    return {domain: sorted(members, key=lambda candidate: candidate.turn) for domain, members in found.items()}


def _domains_of(name: str) -> tuple[str, ...]:
    path, suffix = name.rpartition("/")[2], os.path.splitext(name)[1]
    if suffix not in _NOT_TEXT and ("/licenses/" in name or _LICENSE.search(path)):
        return ("licenses",)
    if path == "METADATA" or name == _HELP_TOPICS:
        return ("prose",)
    return () if ".dist-info/" in name else _SUFFIXES.get(suffix, ())


def _distributions() -> list[importlib.metadata.Distribution]:
    """Every installed distribution but our own, by name; the first of a name shadows the others."""
    by_name: dict[str, importlib.metadata.Distribution] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name and name != _OWN_DISTRIBUTION:
            by_name.setdefault(name, distribution)
    return [by_name[name] for name in sorted(by_name)]


def _package_files() -> Iterator[tuple[str, Path]]:
    """Names and paths of installed files, from each distribution's RECORD (parsed here: it has tens of thousands)."""
    for distribution in _distributions():
        label = distribution.metadata["Name"]
        for row in csv.reader((distribution.read_text("RECORD") or "").splitlines()):
            if row and not row[0].startswith(("..", "/")) and "/__pycache__/" not in row[0]:
                yield f"{label}/{_unversioned(row[0])}", Path(str(distribution.locate_file(row[0])))


def _unversioned(name: str) -> str:
    """A file's name without the version in `x-1.2.dist-info`, so that an upgrade does not reorder the rest."""
    return re.sub(r"^([^/]+?)-[^/-]+\.dist-info/", r"\1.dist-info/", name)


def _standard_library() -> Iterator[tuple[str, Path]]:
    paths = sysconfig.get_paths()
    for root, prefix in ((Path(paths["stdlib"]), "python"), (Path(paths["include"]), "python-include")):
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(set(folders) - _PASSED_OVER)
            for name in sorted(names):
                if not name.startswith("_sysconfigdata"):
                    path = Path(folder, name)
                    yield f"{prefix}/{path.relative_to(root).as_posix()}", path


def _extractor(candidate: Candidate) -> Callable[[str], str]:
    name = candidate.name
    if candidate.domain == "prose" and name.endswith(".py"):
        return extraction.help_topics if name == _HELP_TOPICS else extraction.docstrings
    if candidate.domain == "prose":
        return extraction.description if name.endswith("/METADATA") else extraction.plain
    if candidate.domain in ("python", "stubs", "cython"):
        return extraction.code
    return extraction.plain if candidate.domain == "licenses" else extraction.without_legal_header


def _domain(members: list[Candidate], characters: int, keep: Keep) -> Iterator[list[Document]]:
    """The kept documents of each file, until the domain has its characters."""
    left = characters
    for candidate in members:
        kept = []
        for document in _documents_of(candidate, characters // _SHARE_OF_ONE_FILE):
            if left > 0 and keep(document.text):
                kept.append(document)
                left -= len(document.text)
        if kept:
            yield kept
        if left <= 0:
            return


def _documents_of(candidate: Candidate, limit: int) -> Iterator[Document]:
    """The documents of one file, not more than `limit` characters of it (or one document); all in one group."""
    try:
        text = candidate.path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError):
        return
    total = 0
    if candidate.domain != "licenses" and extraction.is_generated(text):
        return
    for piece in pieces([_extractor(candidate)(text).strip()]):
        if total and total + len(piece) > limit:
            return
        total += len(piece)
        if extraction.reads_like_text(piece):
            yield Document(piece.strip("\n") + "\n", candidate.domain, candidate.name, candidate.name)
