"""A text range: some documents of one split in a blob (zlib of a msgpack list), the unit of a PACK task.

`RangeWriter` collects documents split by split and hands a range to the store as soon as it is full, so that no more
than one range a split is ever in memory.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import msgpack

from corpus.documents import BadCorpus, Document, document_id


class StoredDocument(TypedDict):
    """A document at rest; `document` is its id, 16 hex digits."""

    text: str
    domain: str
    document: str


@dataclass(frozen=True, slots=True)
class TextRange:
    """A stored range: its blob, and how much it holds."""

    index: int
    split: str
    digest: str
    size: int
    documents: int
    characters: int


def pack_range(documents: list[StoredDocument]) -> bytes:
    """The bytes of a range."""
    return zlib.compress(msgpack.packb(documents), level=1)


def read_range(path: Path) -> list[StoredDocument]:
    """The documents of a range blob; raises BadCorpus when the bytes are none."""
    try:
        documents: list[StoredDocument] = msgpack.unpackb(zlib.decompress(path.read_bytes()))
        for document in documents:
            int(document["document"], 16), document["text"].encode(), document["domain"].encode()
    except (zlib.error, ValueError, TypeError, KeyError, AttributeError, msgpack.UnpackException) as error:
        raise BadCorpus(f"{path} is not a range of documents: {error}") from None
    return documents


class RangeWriter:
    """Fills ranges of about `range_characters` a split; `put` stores bytes and answers (digest, size)."""

    def __init__(self, range_characters: int, put: Callable[[bytes], tuple[str, int]]) -> None:
        self._range_characters = range_characters
        self._put = put
        self._open: dict[str, list[StoredDocument]] = {}
        self._characters: dict[str, int] = {}
        self.ranges: list[TextRange] = []

    def add(self, document: Document, split: str) -> None:
        """Append a document to the open range of its split, storing the range first if it would overflow."""
        if self._characters.get(split, 0) + len(document.text) > self._range_characters:
            self._store(split)
        stored = StoredDocument(text=document.text, domain=document.domain, document=document_id(document.text))
        self._open.setdefault(split, []).append(stored)
        self._characters[split] = self._characters.get(split, 0) + len(document.text)

    def finish(self) -> list[TextRange]:
        """Store what is still open, splits in the order of their names; all ranges in index order."""
        for split in sorted(self._open):
            self._store(split)
        return self.ranges

    def _store(self, split: str) -> None:
        documents = self._open.pop(split, [])
        characters = self._characters.pop(split, 0)
        if not documents:
            return
        digest, size = self._put(pack_range(documents))
        self.ranges.append(TextRange(len(self.ranges), split, digest, size, len(documents), characters))
