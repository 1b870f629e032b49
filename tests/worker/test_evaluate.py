"""EVALUATE: the grid of losses against single sequences, batches that follow from the file alone, bytes, selections."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from corpus.token_file import TokenFile
from corpus.tokenizer import byte_tokenizer
from model.path import load_path
from protocol.tasks import EvaluateSpec, Numerics
from routing.records import Losses, evaluated_positions
from worker.evaluate import batches, run_evaluate
from worker.task_path import topology_of

if TYPE_CHECKING:
    from tests.worker.conftest import BlobOf, MakeRun, TinyRun


@pytest.fixture
def run(make_run: MakeRun) -> TinyRun:
    return make_run()


def spec_of(run: TinyRun, blob: BlobOf, **changes: Any) -> EvaluateSpec:
    path = run.add_modules("mixture", path_index=3)
    values = {"path": path, "tokens": blob(run.tokens), "prefix_tokens": 32, "chunk_tokens": 16}
    return EvaluateSpec.model_validate(values | {"numerics": Numerics(device="cpu")} | changes)


def evaluate(run: TinyRun, spec: EvaluateSpec, **more: Any) -> Losses:
    paths = {"selection_path": None, "tokenizer_path": None} | more
    outcome = run_evaluate(spec, run.experiment, run.vocab_size, run.modules, run.tokens, **paths, out_dir=run.root)
    record = Losses.from_bytes(outcome.files["losses"].read_bytes())
    assert outcome.result.tokens == record.count.sum()
    assert outcome.result.loss_sum == pytest.approx(record.loss.sum())
    assert outcome.result.sequences == len(record.positions)
    return record


def test_chunks_hold_the_losses_of_each_sequence_by_itself(run: TinyRun, blob: BlobOf) -> None:
    record = evaluate(run, spec_of(run, blob))
    path = load_path(run.experiment.model, run.vocab_size, topology_of(run.experiment, "mixture"), run.modules)
    with TokenFile.open(run.tokens) as file:
        np.testing.assert_array_equal(record.positions, evaluated_positions(file, None))
        assert file.lengths[record.positions].min() >= 64
        assert file.lengths[record.positions].max() == run.experiment.model.sequence_length
        np.testing.assert_array_equal(record.domains, file.domains[record.positions])
        for line, position in enumerate(record.positions):
            tokens = torch.from_numpy(file.tokens(int(position)).astype(np.int64))
            with torch.no_grad():
                logits = path.logits(path(tokens[None]))[0]
            losses = F.cross_entropy(logits[:-1], tokens[1:], reduction="none").numpy()
            for chunk in range(record.loss.shape[1]):
                # Targets 33 + 16 c .. 48 + 16 c; the loss of target t stands at t - 1.
                mine = losses[32 + 16 * chunk : 48 + 16 * chunk]
                assert record.count[line, chunk] == len(mine)
                assert record.loss[line, chunk] == pytest.approx(mine.sum(dtype=np.float64), abs=1e-3)
    assert record.loss.shape[1] == 6  # (128 - 1 - 32) / 16, rounded up
    assert record.domain_names == ("code", "prose")


def test_repeats_bit_for_bit(run: TinyRun, blob: BlobOf) -> None:
    spec = spec_of(run, blob)
    np.testing.assert_array_equal(evaluate(run, spec).loss, evaluate(run, spec).loss)


def test_first_sequences_and_selections(run: TinyRun, blob: BlobOf) -> None:
    whole = evaluate(run, spec_of(run, blob))
    first = evaluate(run, spec_of(run, blob, max_sequences=3))
    np.testing.assert_array_equal(first.positions, whole.positions[:3])
    np.testing.assert_allclose(first.loss, whole.loss[:3], atol=1e-3)
    chosen = run.root / "selection"
    chosen.write_bytes(whole.positions[[1, 4]].astype("<u4").tobytes())
    selected = evaluate(run, spec_of(run, blob, selection=blob(chosen)), selection_path=chosen)
    np.testing.assert_array_equal(selected.positions, whole.positions[[1, 4]])
    np.testing.assert_allclose(selected.loss, whole.loss[[1, 4]], atol=1e-3)


def test_counts_the_bytes_of_counted_targets(run: TinyRun, blob: BlobOf) -> None:
    tokenizer = byte_tokenizer()
    tokenizer_file = run.root / "tokenizer.json"
    tokenizer_file.write_bytes(tokenizer.to_bytes())
    token_bytes = tokenizer.token_byte_lengths()
    assert set(token_bytes.tolist()) == {0, 1}  # special tokens stand for nothing
    record = evaluate(run, spec_of(run, blob), tokenizer_path=tokenizer_file)
    with TokenFile.open(run.tokens) as file:
        for line, position in enumerate(record.positions):
            assert record.text_bytes[line].sum() == token_bytes[file.tokens(int(position))[33:]].sum()


def test_a_file_without_evaluated_sequences_gives_an_empty_record(
    run: TinyRun, blob: BlobOf, write_tokens: Any
) -> None:
    write_tokens(run.tokens, [40, 63])
    record = evaluate(run, spec_of(run, blob))
    assert record.loss.shape == (0, 6)


def test_batches_group_like_lengths_within_the_budget() -> None:
    lengths = np.array([9, 3, 5, 3, 20, 4])
    found = [indices.tolist() for indices in batches(lengths, batch_tokens=12)]
    assert found == [[1, 3, 5], [2], [0], [4]]
    assert list(batches(np.array([], np.int64), 12)) == []
