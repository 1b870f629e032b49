from __future__ import annotations

from pathlib import Path

import pytest

from corpus.catalogue import sample, summary
from corpus.documents import BadCorpus, Document, document_id
from corpus.manifest import CorpusManifest, Tally
from corpus.text_range import RangeWriter


@pytest.fixture
def corpus(tmp_path: Path) -> tuple[CorpusManifest, dict[str, Path]]:
    """Six documents in two splits and two domains."""
    blobs: dict[str, Path] = {}

    def put(data: bytes) -> tuple[str, int]:
        path = tmp_path / f"blob{len(blobs)}"
        path.write_bytes(data)
        blobs[path.name] = path
        return path.name, len(data)

    writer, tally = RangeWriter(25, put), Tally()
    for number, (domain, split) in enumerate([("b", "train"), ("a", "train"), ("a", "train"), ("a", "test")]):
        writer.add(Document(f"document {number}", domain), split)
        tally.add(domain, split, 10)
    ranges = tuple(writer.finish())
    manifest = CorpusManifest(("t", 1), 258, tally.domains, ranges, tally.counts(), {"python": "3"}, {"short": 2})
    return manifest, blobs


def test_sizes_add_up_by_domain_and_split(corpus: tuple[CorpusManifest, dict[str, Path]]) -> None:
    told = summary(corpus[0])
    assert [(each.domain, each.documents, each.characters) for each in told.domains] == [("a", 3, 30), ("b", 1, 10)]
    assert told.domains[0].documents_by_split == {"train": 2, "router": 0, "stop": 0, "validation": 0, "test": 1}
    assert (told.total.documents, told.total.characters_per_document) == (4, 10.0)
    assert (told.ranges, told.digest, told.dropped) == (3, corpus[0].digest, {"short": 2})


def test_a_sample_shows_beginnings(corpus: tuple[CorpusManifest, dict[str, Path]]) -> None:
    manifest, blobs = corpus
    shown = sample(manifest, blobs.__getitem__, domain="b", characters=3)
    assert [(each.text, each.characters, each.domain, each.split) for each in shown] == [("doc", 10, "b", "train")]
    assert shown[0].document == document_id("document 0")
    assert [each.text for each in sample(manifest, blobs.__getitem__, split="test")] == ["document 3"]
    assert len(sample(manifest, blobs.__getitem__, documents=1)) == 1


def test_what_is_not_there_is_named(corpus: tuple[CorpusManifest, dict[str, Path]]) -> None:
    manifest, blobs = corpus
    with pytest.raises(BadCorpus, match="no domain 'c'; it has a, b"):
        sample(manifest, blobs.__getitem__, domain="c")
    with pytest.raises(BadCorpus, match="split 'stop'"):
        sample(manifest, blobs.__getitem__, split="stop")
    with pytest.raises(BadCorpus, match="domain 'b' fell into the split 'test'"):
        sample(manifest, blobs.__getitem__, split="test", domain="b")
