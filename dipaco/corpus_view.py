"""A corpus for people: of a configuration (read once, into a temporary folder) or of a run as it was built."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from configs.corpus import TokenizerConfig
from configs.load import load_config
from coordinator.snapshot import RunSnapshot
from corpus.builder import build_corpus
from corpus.catalogue import CorpusSummary, SampledDocument, sample, summary
from corpus.manifest import CorpusManifest
from corpus.splits import SPLITS
from model.store import BlobStore


def look(where: Path, *, samples: int, domain: str | None) -> tuple[CorpusSummary, list[SampledDocument]]:
    """Sizes and some documents; raises InvalidConfig, RunUnusable, BadCorpus."""
    if where.is_dir():
        with RunSnapshot.held(where) as snapshot:
            return _look(_manifest(snapshot), snapshot.store, samples, domain)
    config = load_config(where)
    with tempfile.TemporaryDirectory(prefix="dipaco-corpus-") as scratch:
        store = BlobStore(Path(scratch))
        manifest = build_corpus(config.experiment.corpus, TokenizerConfig(kind="bytes"), store, _silently)
        return _look(manifest, store, samples, domain)


def _manifest(snapshot: RunSnapshot) -> CorpusManifest:
    digest, _ = snapshot.corpus["manifest"]
    return CorpusManifest.from_bytes(snapshot.store.path(digest).read_bytes())


def _look(
    manifest: CorpusManifest, store: BlobStore, samples: int, domain: str | None
) -> tuple[CorpusSummary, list[SampledDocument]]:
    if not samples:
        return summary(manifest), []
    domains = [domain] if domain is not None else list(manifest.domains)
    shares = [samples // len(domains) + (index < samples % len(domains)) for index in range(len(domains))]
    documents = [
        document
        for name, share in zip(domains, shares, strict=True)
        if share
        for document in sample(manifest, store.path, domain=name, documents=share)
    ]
    return summary(manifest), documents


def _silently(what: str, done: int, expected: int) -> None:
    """Nobody follows it."""


def summary_table(found: CorpusSummary) -> Any:
    """Domains down, splits across, as a rich renderable."""
    from rich.table import Table

    table = Table(title=f"corpus {found.digest[:12]}, {found.ranges} ranges", title_justify="left")
    table.add_column("domain")
    for column in ("documents", "characters", "mean", *SPLITS):
        table.add_column(column, justify="right")
    for row in (*found.domains, found.total):
        splits = [f"{row.documents_by_split[split]:,}" for split in SPLITS]
        mean = f"{row.characters_per_document:,.0f}"
        table.add_row(row.domain, f"{row.documents:,}", f"{row.characters:,}", mean, *splits)
    if found.dropped:
        left_out = ", ".join(f"{count:,} {why}" for why, count in sorted(found.dropped.items()))
        table.caption = f"left out: {left_out}"
    return table


def sample_text(document: SampledDocument) -> Any:
    """The beginning of a document under a line that says what it is."""
    from rich.text import Text

    head = f"\n--- {document.domain}, {document.split}, {document.characters:,} characters ({document.document})\n"
    return Text.assemble((head, "bold"), document.text)
