"""PACK: a range of documents becomes sequences, and a shard's sequences one file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from corpus.documents import Document
from corpus.text_range import RangeWriter
from corpus.token_file import TokenFile
from corpus.tokenizer import byte_tokenizer
from model.store import BlobStore
from protocol.tasks import MalformedMessage, PackSpec
from routing.records import ShardManifest
from worker.pack import run_pack

if TYPE_CHECKING:
    from tests.worker.conftest import MakeRun


def test_tokenizes_a_range(make_run: MakeRun) -> None:
    run = make_run()
    store = BlobStore(run.root / "store")
    writer = RangeWriter(10_000, store.put_bytes)
    for number in range(3):
        writer.add(Document(text="x" * (200 + number), domain="prose", group=None, source="made"), "train")
    (stored,) = writer.finish()
    tokenizer = run.root / "tokenizer.json"
    tokenizer.write_bytes(byte_tokenizer().to_bytes())
    spec = PackSpec(mode="tokenize", range_index=7)
    outcome = run_pack(spec, run.experiment, tokenizer, store.path(stored.digest), [], None, run.root)
    with TokenFile.open(outcome.files["tokens"]) as file:
        assert set(file.ids >> np.uint64(32)) == {7}
        assert file.lengths.max() == run.experiment.model.sequence_length
        # 603 bytes, an EOS a document, a BOS a sequence
        assert outcome.result.tokens == file.num_tokens == 603 + 3 + file.count
        assert outcome.result.sequences == file.count


def test_gathers_the_sequences_of_a_manifest(make_run: MakeRun) -> None:
    run = make_run()
    with TokenFile.open(run.tokens) as file:
        wanted = file.ids[[2, 3, 30]]
        lengths = file.lengths[[2, 3, 30]]
    manifest = run.root / "manifest"
    manifest.write_bytes(ShardManifest(shard=1, router="", ids=wanted).to_bytes())
    out_dir = run.root / "out"
    out_dir.mkdir()
    outcome = run_pack(PackSpec(mode="gather"), run.experiment, None, None, [run.tokens], manifest, out_dir)
    with TokenFile.open(outcome.files["tokens"]) as gathered:
        np.testing.assert_array_equal(gathered.ids, wanted)
    assert outcome.result.tokens == lengths.sum()
    assert outcome.result.sequences == 3


@pytest.mark.parametrize("mode", ["tokenize", "gather"])
def test_says_what_is_missing(make_run: MakeRun, mode: str) -> None:
    run = make_run()
    spec = PackSpec.model_validate({"mode": mode})
    with pytest.raises(MalformedMessage, match=f"mode '{mode}' needs"):
        run_pack(spec, run.experiment, None, None, [], None, run.root)
