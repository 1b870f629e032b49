"""What a corpus holds, for people: documents and characters by domain and split, and a sample of its documents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from corpus.documents import BadCorpus
from corpus.manifest import CorpusManifest
from corpus.splits import SPLITS
from corpus.text_range import read_range


@dataclass(frozen=True, slots=True)
class DomainSummary:
    """One domain (or all of them): its size, its documents by split, and its mean document."""

    domain: str
    documents: int
    characters: int
    documents_by_split: dict[str, int]
    characters_by_split: dict[str, int]

    @property
    def characters_per_document(self) -> float:
        return self.characters / self.documents if self.documents else 0.0


@dataclass(frozen=True, slots=True)
class CorpusSummary:
    """The whole corpus: its domains, the totals over them, and what was left out."""

    digest: str
    vocab_size: int
    ranges: int
    domains: tuple[DomainSummary, ...]
    total: DomainSummary
    dropped: dict[str, int]
    sources: dict[str, str]


@dataclass(frozen=True, slots=True)
class SampledDocument:
    """The beginning of a document, for reading."""

    document: str
    domain: str
    split: str
    characters: int
    text: str


def summary(manifest: CorpusManifest) -> CorpusSummary:
    """The sizes of a corpus by domain and split."""
    return CorpusSummary(
        digest=manifest.digest,
        vocab_size=manifest.vocab_size,
        ranges=len(manifest.ranges),
        domains=tuple(_domain_summary(manifest, domain, {domain}) for domain in manifest.domains),
        total=_domain_summary(manifest, "all", set(manifest.domains)),
        dropped=manifest.dropped,
        sources=manifest.sources,
    )


def _domain_summary(manifest: CorpusManifest, label: str, domains: set[str]) -> DomainSummary:
    documents, characters = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    for count in manifest.counts:
        if count.domain in domains:
            documents[count.split] += count.documents
            characters[count.split] += count.characters
    return DomainSummary(label, sum(documents.values()), sum(characters.values()), documents, characters)


def sample(
    manifest: CorpusManifest,
    blob_path: Callable[[str], Path],
    split: str = "train",
    domain: str | None = None,
    documents: int = 3,
    characters: int = 400,
) -> list[SampledDocument]:
    """The documents of smallest id in a split's first range (or the first that has the domain), cut to `characters`.

    `blob_path` answers where a blob lies. Raises BadCorpus for a split or a domain that the corpus does not have.
    """
    if domain is not None and domain not in manifest.domains:
        raise BadCorpus(f"the corpus has no domain {domain!r}; it has {', '.join(manifest.domains)}")
    for text_range in manifest.ranges_of(split):
        stored = [
            document for document in read_range(blob_path(text_range.digest)) if domain in (None, document["domain"])
        ]
        if stored:
            stored.sort(key=lambda document: document["document"])
            return [
                SampledDocument(
                    document["document"],
                    document["domain"],
                    split,
                    len(document["text"]),
                    document["text"][:characters],
                )
                for document in stored[:documents]
            ]
    raise BadCorpus(f"no document of the domain {domain!r} fell into the split {split!r}")
