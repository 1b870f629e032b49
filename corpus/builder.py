"""Building a corpus: documents stream in, fall into splits and are stored as ranges; then the tokenizer is made.

Also the two steps that PACK tasks take with the ranges: cutting one into sequences, and gathering those of a shard.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from configs.corpus import CorpusConfig, FilesSource, HuggingFaceSource, InstalledSource, TokenizerConfig
from corpus import files, hugging_face, installed
from corpus.documents import BadCorpus, Document, Keep
from corpus.duplicates import NearDuplicates
from corpus.manifest import CorpusManifest, Tally
from corpus.sample import TextSample
from corpus.splits import split_of
from corpus.text_range import RangeWriter, read_range
from corpus.token_file import SequenceIndex, dtype_for, gather_sequences, write_token_file
from corpus.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from corpus.windows import windows

__all__ = ["build_corpus", "documents", "gather_sequences", "tokenize_range"]

_ENCODE_DOCUMENTS = 64
_REPORT_DOCUMENTS = 200

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, characters done, characters expected or 0 where unknown)."""


@runtime_checkable
class Blobs(Protocol):
    """What a build needs of the blob store."""

    def put_bytes(self, data: bytes, /) -> tuple[str, int]: ...


def build_corpus(config: CorpusConfig, tokenizer: TokenizerConfig, store: Blobs, progress: Progress) -> CorpusManifest:
    """Read all documents once and store ranges and tokenizer; raises BadCorpus or BadTokenizer.

    Memory is bounded by one range a split, the tokenizer's sample and the near-duplicate filter.
    """
    dropped: Counter[str] = Counter()
    ranges = RangeWriter(config.range_characters, store.put_bytes)
    tally, sample = Tally(), TextSample(tokenizer.sample_characters)
    expected = _expected_characters(config)
    characters = 0
    for number, document in enumerate(documents(config, _keep(config, dropped)), start=1):
        split = split_of(document.text, document.group, config.splits)
        ranges.add(document, split)
        tally.add(document.domain, split, len(document.text))
        if split == "train" and tokenizer.kind == "bpe":
            sample.add(document.text)
        characters += len(document.text)
        if number % _REPORT_DOCUMENTS == 0:
            progress("reading documents", characters, expected)
    _refuse_empty(tally, config, dropped)
    progress("tokenizer", 0, 1)
    trained = _tokenizer(tokenizer, sample)
    progress("tokenizer", 1, 1)
    return CorpusManifest(
        tokenizer=store.put_bytes(trained.to_bytes()),
        vocab_size=trained.vocab_size,
        domains=tally.domains,
        ranges=tuple(ranges.finish()),
        counts=tally.counts(),
        sources=installed.source_versions() if isinstance(config.source, InstalledSource) else {},
        dropped=dict(dropped),
    )


def documents(config: CorpusConfig, keep: Keep) -> Iterator[Document]:
    """The documents of the configured source that `keep` accepts."""
    source = config.source
    if isinstance(source, FilesSource):
        return files.documents(source, keep)
    if isinstance(source, HuggingFaceSource):
        return hugging_face.documents(source, keep)
    return installed.documents(source, keep)


def _keep(config: CorpusConfig, dropped: Counter[str]) -> Keep:
    seen = NearDuplicates() if config.deduplicate else None

    def keep(text: str) -> bool:
        if len(text) < config.min_document_characters:
            dropped["short"] += 1
            return False
        if seen is not None and not seen.add(text):
            dropped["duplicate"] += 1
            return False
        return True

    return keep


def _expected_characters(config: CorpusConfig) -> int:
    if isinstance(config.source, InstalledSource):
        return config.source.characters_per_domain * len(installed.DOMAINS)
    return 0


def _refuse_empty(tally: Tally, config: CorpusConfig, dropped: Counter[str]) -> None:
    counts = tally.counts()
    if not counts:
        raise BadCorpus(
            f"none of the {dropped.total()} documents has {config.min_document_characters} characters; "
            "lower corpus.min_document_characters or give longer documents"
        )
    if not any(count.split == "train" for count in counts):
        raise BadCorpus(
            f"none of the {sum(count.documents for count in counts)} documents fell into the train split; "
            "add documents or lower the shares in corpus.splits"
        )


def _tokenizer(config: TokenizerConfig, sample: TextSample) -> Tokenizer:
    if config.kind == "bytes":
        return byte_tokenizer()
    if config.kind == "file":
        assert config.path is not None, "the schema asks for a path"
        return Tokenizer.from_file(config.path)
    return train_bpe(sample.texts(), config.vocab_size)


def tokenize_range(
    text_blob_path: Path, tokenizer: Tokenizer, sequence_length: int, range_index: int, out_path: Path
) -> None:
    """Cut the documents of a range into sequences and write them; id = range_index << 32 | position."""
    stored = read_range(text_blob_path)
    names = tuple(sorted({document["domain"] for document in stored}))
    sequences: list[np.ndarray] = []
    owners: list[int] = []
    for position, tokens in enumerate(_encoded((document["text"] for document in stored), tokenizer)):
        for window in windows(tokens, sequence_length, tokenizer.bos_id, tokenizer.eos_id):
            sequences.append(np.array(window, dtype_for(tokenizer.vocab_size)))
            owners.append(position)
    domain_of = np.array([names.index(document["domain"]) for document in stored], np.uint16)
    document_of = np.array([int(document["document"], 16) for document in stored], np.uint64)
    index = SequenceIndex(
        ids=np.uint64(range_index << 32) + np.arange(len(sequences), dtype=np.uint64),
        lengths=np.array([len(sequence) for sequence in sequences], np.uint32),
        domains=domain_of[owners],
        documents=document_of[owners],
        domain_names=names,
    )
    write_token_file(out_path, index, dtype_for(tokenizer.vocab_size), sequences)


def _encoded(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == _ENCODE_DOCUMENTS:
            yield from tokenizer.encode_batch(batch)
            batch = []
    yield from tokenizer.encode_batch(batch)
