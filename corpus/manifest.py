"""The manifest of a corpus: tokenizer, ranges, counts and source versions; its digest stands for all of the text."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import msgpack

from corpus.documents import BadCorpus
from corpus.splits import SPLITS
from corpus.text_range import TextRange


@dataclass(frozen=True, slots=True)
class Count:
    """Documents and characters of one domain in one split."""

    domain: str
    split: str
    documents: int
    characters: int


@dataclass(frozen=True, slots=True)
class CorpusManifest:
    """A built corpus. `tokenizer` is (digest, size) of its blob, `sources` the versions the text came from,
    `dropped` the documents left out as too short or as near-duplicates."""

    tokenizer: tuple[str, int]
    vocab_size: int
    domains: tuple[str, ...]
    ranges: tuple[TextRange, ...]
    counts: tuple[Count, ...]
    sources: dict[str, str]
    dropped: dict[str, int]

    def ranges_of(self, split: str) -> tuple[TextRange, ...]:
        """The ranges of a split in index order; raises BadCorpus when no document fell into it."""
        ranges = tuple(text_range for text_range in self.ranges if text_range.split == split)
        if not ranges:
            raise BadCorpus(
                f"no document of the corpus fell into the split {split!r}; add documents or raise corpus.splits.{split}"
            )
        return ranges

    def documents_of(self, split: str) -> int:
        """How many documents a split has."""
        return sum(count.documents for count in self.counts if count.split == split)

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest: tokenizer, every range by content, counts and source versions."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """The msgpack form."""
        fields = asdict(self)
        fields["sources"] = sorted(self.sources.items())
        fields["dropped"] = sorted(self.dropped.items())
        packed: bytes = msgpack.packb(fields)
        return packed

    @classmethod
    def from_bytes(cls, data: bytes) -> CorpusManifest:
        """The inverse of `to_bytes`; raises BadCorpus."""
        try:
            fields: dict[str, Any] = msgpack.unpackb(data)
            digest, size = fields["tokenizer"]
            return cls(
                tokenizer=(str(digest), int(size)),
                vocab_size=int(fields["vocab_size"]),
                domains=tuple(fields["domains"]),
                ranges=tuple(TextRange(**each) for each in fields["ranges"]),
                counts=tuple(Count(**each) for each in fields["counts"]),
                sources=dict(fields["sources"]),
                dropped=dict(fields["dropped"]),
            )
        except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
            raise BadCorpus(f"not the manifest of a corpus: {error}") from None


class Tally:
    """Counts documents and characters by domain and split while a corpus is built."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], list[int]] = {}

    def add(self, domain: str, split: str, characters: int) -> None:
        count = self._counts.setdefault((domain, split), [0, 0])
        count[0] += 1
        count[1] += characters

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(sorted({domain for domain, _ in self._counts}))

    def counts(self) -> tuple[Count, ...]:
        """Sorted by domain, splits in the order of SPLITS."""
        order = sorted(self._counts, key=lambda key: (key[0], SPLITS.index(key[1])))
        return tuple(Count(domain, split, *self._counts[domain, split]) for domain, split in order)
