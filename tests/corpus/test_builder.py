from __future__ import annotations

import hashlib
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from configs.corpus import CorpusConfig, FilesSource, InstalledSource, SplitsConfig, TokenizerConfig
from corpus.builder import build_corpus, tokenize_range
from corpus.documents import BadCorpus
from corpus.manifest import CorpusManifest
from corpus.splits import SPLITS, split_of
from corpus.text_range import read_range
from corpus.token_file import TokenFile
from corpus.tokenizer import BadTokenizer, Tokenizer, byte_tokenizer


class Store:
    """Blobs in a directory, as the blob store keeps them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(exist_ok=True)

    def put_bytes(self, data: bytes, /) -> tuple[str, int]:
        digest = hashlib.sha256(data).hexdigest()
        (self.root / digest).write_bytes(data)
        return digest, len(data)

    def path(self, digest: str) -> Path:
        return self.root / digest


SPLIT_SHARES = SplitsConfig(router=0.1, stop=0.1, validation=0.1, test=0.2)


def _config(
    folder: Path, count: int = 200, range_characters: int = 5_000, repeats: int = 1, **changes: object
) -> CorpusConfig:
    path = folder / "documents.jsonl"
    with path.open("w") as file:
        for number in list(range(count)) * repeats:
            words = " ".join(map(str, range(10_000 + number * 100, 10_040 + number * 100)))
            file.write(json.dumps({"text": f"Document {number}: {words}", "domain": "ab"[number % 2]}) + "\n")
    source = FilesSource(kind="files", paths=[str(path)])
    return CorpusConfig(source=source, splits=SPLIT_SHARES, range_characters=range_characters, **changes)  # type: ignore[arg-type]


def _build(config: CorpusConfig, store: Store, tokenizer: TokenizerConfig | None = None) -> CorpusManifest:
    return build_corpus(config, tokenizer or TokenizerConfig(kind="bytes"), store, lambda *_: None)


def test_every_document_stands_in_the_range_of_its_split(tmp_path: Path) -> None:
    store = Store(tmp_path / "blobs")
    manifest = _build(_config(tmp_path), store)
    assert [each.index for each in manifest.ranges] == list(range(len(manifest.ranges)))
    seen = []
    for text_range in manifest.ranges:
        documents = read_range(store.path(text_range.digest))
        assert len(documents) == text_range.documents
        assert sum(len(document["text"]) for document in documents) == text_range.characters <= 5_000
        assert {split_of(document["text"], None, SPLIT_SHARES) for document in documents} == {text_range.split}
        seen += [document["document"] for document in documents]
    assert len(seen) == len(set(seen)) == 200
    assert {each.split for each in manifest.ranges} == set(SPLITS)
    assert sum(count.documents for count in manifest.counts) == 200
    assert manifest.domains == ("a", "b")
    assert sum(manifest.documents_of(split) for split in SPLITS) == 200


def test_a_build_is_deterministic_and_its_manifest_survives_rest(tmp_path: Path) -> None:
    tokenizer = TokenizerConfig(kind="bpe", vocab_size=300)
    first = _build(_config(tmp_path), Store(tmp_path / "one"), tokenizer)
    second = _build(_config(tmp_path), Store(tmp_path / "two"), tokenizer)
    assert first == second
    assert CorpusManifest.from_bytes(first.to_bytes()) == first
    assert CorpusManifest.from_bytes(first.to_bytes()).digest == first.digest
    with pytest.raises(BadCorpus, match="not the manifest"):
        CorpusManifest.from_bytes(b"\x81\xa1a\x01")


def test_the_digest_follows_text_tokenizer_and_versions(tmp_path: Path) -> None:
    store = Store(tmp_path / "blobs")
    plain = _build(_config(tmp_path), store)
    shorter = _build(_config(tmp_path, count=199), store)
    trained = _build(_config(tmp_path, count=199), store, TokenizerConfig(kind="bpe", vocab_size=300))
    assert len({plain.digest, shorter.digest, trained.digest}) == 3
    changed = CorpusManifest.from_bytes(plain.to_bytes())
    changed.sources["numpy"] = "9.9"
    assert changed.digest != plain.digest


def test_duplicates_and_short_documents_are_left_out_and_counted(tmp_path: Path) -> None:
    store = Store(tmp_path / "blobs")
    assert _build(_config(tmp_path, count=20, repeats=2), store).dropped == {"duplicate": 20}
    kept = _build(_config(tmp_path, count=20, repeats=2, deduplicate=False), store)
    assert sum(count.documents for count in kept.counts) == 40
    assert _build(_config(tmp_path, min_document_characters=252), store).dropped["short"] > 0


def test_no_document_long_enough_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadCorpus, match=r"none of the 30 documents has 9999 characters; lower corpus\.min_document"):
        _build(_config(tmp_path, count=30, min_document_characters=9_999), Store(tmp_path / "blobs"))


def test_a_corpus_without_training_documents_is_refused(tmp_path: Path) -> None:
    number = next(number for number in range(100) if split_of("x" * 300 + str(number), None, SPLIT_SHARES) == "test")
    config = _config(tmp_path)
    (tmp_path / "documents.jsonl").write_text(json.dumps({"text": "x" * 300 + str(number)}))
    with pytest.raises(BadCorpus, match="none of the 1 documents fell into the train split"):
        _build(config, Store(tmp_path / "blobs"))


def test_an_empty_split_is_refused_when_it_is_asked_for(tmp_path: Path) -> None:
    config = _config(tmp_path).model_copy(update={"splits": SplitsConfig(router=0.0)})
    manifest = _build(config, Store(tmp_path / "blobs"))
    assert sum(each.documents for each in manifest.ranges_of("train")) == manifest.documents_of("train")
    with pytest.raises(BadCorpus, match=r"split 'router'; add documents or raise corpus\.splits\.router"):
        manifest.ranges_of("router")


def test_a_missing_tokenizer_file_is_refused(tmp_path: Path) -> None:
    tokenizer = TokenizerConfig(kind="file", path=str(tmp_path / "nowhere.json"))
    with pytest.raises(BadTokenizer, match=r"cannot read the tokenizer .*nowhere\.json"):
        _build(_config(tmp_path), Store(tmp_path / "blobs"), tokenizer)


def test_any_tokenizer_file_is_taken(tmp_path: Path) -> None:
    (tmp_path / "given.json").write_bytes(byte_tokenizer().to_bytes())
    store = Store(tmp_path / "blobs")
    manifest = _build(_config(tmp_path), store, TokenizerConfig(kind="file", path=str(tmp_path / "given.json")))
    assert manifest.vocab_size == 258
    assert Tokenizer.from_file(store.path(manifest.tokenizer[0])).encode("a") == [ord("a") + 2]


def test_sequences_are_the_documents_of_a_range(tmp_path: Path) -> None:
    store = Store(tmp_path / "blobs")
    manifest = _build(_config(tmp_path), store, TokenizerConfig(kind="bpe", vocab_size=300))
    tokenizer = Tokenizer.from_file(store.path(manifest.tokenizer[0]))
    text_range = manifest.ranges_of("train")[1]
    tokenize_range(store.path(text_range.digest), tokenizer, 64, text_range.index, tmp_path / "tokens")
    documents = read_range(store.path(text_range.digest))
    with TokenFile.open(tmp_path / "tokens") as file:
        assert file.ids.tolist() == [text_range.index << 32 | position for position in range(file.count)]
        assert int(file.lengths.max()) == 64
        for document in documents:
            places = np.flatnonzero(file.documents == int(document["document"], 16))
            tokens = [int(token) for place in places for token in file.tokens(int(place))[1:]]
            assert tokens == [*tokenizer.encode(document["text"]), tokenizer.eos_id]
            assert {file.domain_names[file.domains[place]] for place in places} == {document["domain"]}
        assert all(file.tokens(i)[0] == tokenizer.bos_id for i in range(file.count))


def test_tokenizing_a_range_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    store = Store(tmp_path / "blobs")
    text_range = _build(_config(tmp_path), store).ranges[0]
    for name in ("one", "two"):
        tokenize_range(store.path(text_range.digest), byte_tokenizer(), 64, 0, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_bytes_that_are_no_range_are_refused(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"not a range")
    with pytest.raises(BadCorpus, match="is not a range of documents"):
        tokenize_range(tmp_path / "blob", byte_tokenizer(), 64, 0, tmp_path / "tokens")


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    peaks = []
    for count in (500, 4_000):
        config = _config(tmp_path, count=count, deduplicate=False, range_characters=10_000)
        tokenizer = TokenizerConfig(kind="bpe", vocab_size=258, sample_characters=10_000)
        store = Store(tmp_path / f"blobs{count}")
        tracemalloc.start()
        _build(config, store, tokenizer)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 100_000  # the documents alone grow by 850,000 characters


def test_the_embedded_corpus_builds_and_reports_progress(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    config = CorpusConfig(source=InstalledSource(characters_per_domain=200_000))
    manifest = build_corpus(
        config, TokenizerConfig(vocab_size=300), Store(tmp_path / "blobs"), lambda *args: told.append(args)
    )
    assert manifest.vocab_size == 300
    assert manifest.sources["python"]
    reading = [done for label, done, _ in told if label == "reading documents"]
    assert reading == sorted(reading)
    assert {label for label, _, _ in told} == {"reading documents", "tokenizer"}
    assert len(manifest.domains) == 7
