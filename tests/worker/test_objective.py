"""The router LM's objective: what a token is to predict, which rows of the head learn it, and that it is learnt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from configs.schema import InnerConfig
from corpus.rows import IGNORED, batch, pack_rows
from corpus.token_file import SequenceIndex, TokenFile, write_token_file
from model import tensor_file
from model.path import load_path
from protocol.tasks import FeaturizeSpec, MalformedMessage, Numerics, PathRef, TrainSpec
from routing.records import MalformedRecord, Routes
from routing.targets import NO_TARGET
from worker.checkpoints import Checkpoints
from worker.featurize import run_featurize
from worker.objective import NextPath
from worker.outcome import TaskOutcome, no_progress
from worker.pace import Pace
from worker.schedule import router_learning_rate
from worker.task_path import topology_of
from worker.train import run_train

if TYPE_CHECKING:
    from tests.worker.conftest import BlobOf, MakeRun, TinyRun

P, PREFIX = 4, 32
KEYS = np.arange(10, 10 + P)
"""A planted rule: the last of these tokens that was read tells which path is best from there on."""


def planted(tokens: np.ndarray) -> np.ndarray:
    """The targets of one sequence by the rule."""
    targets, path = np.full(len(tokens), NO_TARGET, np.uint16), 0
    for place, token in enumerate(tokens):
        path = int(token) - 10 if token in KEYS else path
        if PREFIX <= place < len(tokens) - 1:
            targets[place] = path
    return targets


def write_planted(run: TinyRun, sequences: int = 60, seed: int = 0) -> Path:
    """Replace the tokens of the run by sequences with a key every few tokens; returns their targets."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(66, 129, sequences)
    rows = []
    for length in lengths:
        tokens = generator.integers(20, 90, int(length))
        tokens[0] = 0
        for place in range(int(generator.integers(1, 9)), int(length), 9):
            tokens[place] = generator.choice(KEYS)
        rows.append(tokens.astype(np.uint16))
    index = SequenceIndex(
        ids=np.arange(sequences, dtype=np.uint64),
        lengths=lengths.astype(np.uint32),
        domains=np.zeros(sequences, np.uint16),
        documents=np.arange(sequences, dtype=np.uint64),
        domain_names=("prose",),
    )
    write_token_file(run.tokens, index, "uint16", rows)
    targets = run.root / "targets"
    write_token_file(targets, index, "uint16", (planted(tokens) for tokens in rows))
    return targets


def router_spec(run: TinyRun, path: PathRef, **changes: Any) -> TrainSpec:
    return run.train_spec(path, **({"objective": "router", "outer": "assign"} | changes))


def train(
    run: TinyRun,
    spec: TrainSpec,
    targets: Path,
    name: str,
    inner_state: Path | None = None,
    checkpoints: Checkpoints | None = None,
) -> TaskOutcome:
    out_dir = run.root / name
    out_dir.mkdir()
    files = (run.modules, [run.tokens], inner_state, out_dir)
    return run_train(spec, run.experiment, run.vocab_size, *files, no_progress, checkpoints, [targets])


def test_a_planted_rule_is_learnt_and_followed(make_run: MakeRun, blob: BlobOf) -> None:
    run = make_run(inner={"learning_rate": 2e-2, "weight_decay": 0.0})
    targets = write_planted(run)
    path = run.add_modules("router")
    trained = train(run, router_spec(run, path, steps=240, total_steps=240), targets, "trained")
    assert trained.result.step_losses[0] == pytest.approx(np.log(P), abs=0.1)
    assert np.mean(trained.result.step_losses[-5:]) < 0.2
    write_planted(run, 12, seed=1)  # others than those it has learnt from
    run.modules = {module_id: trained.files[module_id] for module_id in ("0.0", "1.0")}
    spec = FeaturizeSpec(
        mode="look",
        base=path,
        tokens=blob(run.tokens),
        prefix_tokens=PREFIX,
        numerics=Numerics(device="cpu"),
        intervals=[16],
    )
    outcome = run_featurize(spec, run.experiment, run.vocab_size, run.modules, run.tokens, None, run.root)
    record = Routes.from_bytes(outcome.files["routes"].read_bytes())
    agreed = []
    with TokenFile.open(run.tokens) as file:
        for line, position in enumerate(record.positions):
            best = planted(file.tokens(int(position)))[PREFIX:-1:16]
            agreed += (best == record.every[16][line, : len(best)]).tolist()
    assert np.mean(agreed) > 0.9


def test_the_loss_is_that_of_the_paths_alone(make_run: MakeRun) -> None:
    """Against plain cross-entropy over the first P rows of the head, sequence by sequence."""
    run = make_run()
    targets, path = write_planted(run), run.add_modules("router")
    outcome = train(run, router_spec(run, path, steps=1), targets, "out")
    model = load_path(run.experiment.model, run.vocab_size, topology_of(run.experiment, "router"), run.modules)
    total, count = 0.0, 0
    with TokenFile.open(run.tokens) as file, TokenFile.open(targets) as labels, torch.no_grad():
        rows = pack_rows(file.lengths, run.experiment.model.sequence_length)
        for row in rows.batch_rows(7, 0, run.experiment.inner.batch_rows):
            for index in rows.sequences(int(row)):
                tokens = torch.from_numpy(file.tokens(int(index)).astype(np.int64))
                wanted = torch.from_numpy(labels.tokens(int(index)).astype(np.int64))
                has = wanted != NO_TARGET
                scores = model.logits(model(tokens[None]))[0, :, :P]
                total += float(F.cross_entropy(scores[has], wanted[has], reduction="sum"))
                count += int(has.sum())
    assert outcome.result.tokens == count
    assert outcome.result.loss_sum == pytest.approx(total, rel=1e-5)


def test_rows_of_the_head_that_are_no_path_get_no_gradient(make_run: MakeRun) -> None:
    run = make_run(inner={"weight_decay": 0.0})
    targets, path = write_planted(run), run.add_modules("router")
    before = tensor_file.read(run.modules["1.0"])["lm_head.weight"].copy()
    after = tensor_file.read(train(run, router_spec(run, path), targets, "out").files["1.0"])["lm_head.weight"]
    np.testing.assert_array_equal(after[P:], before[P:])
    assert (after[:P] != before[:P]).all()


def test_goes_on_with_the_same_bits_from_its_tasks_and_its_checkpoints(make_run: MakeRun) -> None:
    run = make_run()
    targets, path = write_planted(run), run.add_modules("router")
    whole = train(run, router_spec(run, path, steps=6, total_steps=6), targets, "whole")
    first = train(run, router_spec(run, path, steps=3, total_steps=6), targets, "first")
    kept: list[Any] = []
    watched = Checkpoints(lambda file, each: kept.append((each, file.read_bytes())), Always(), run.root, print)
    train(run, router_spec(run, path, steps=6, total_steps=6), targets, "watched", checkpoints=watched)
    watched.wait(30.0)
    checkpoint, data = kept[-1]
    resume = run.root / "resume"
    resume.write_bytes(data)
    rest = Checkpoints(lambda file, each: None, None, run.root, print, resume_path=resume)
    spec = router_spec(run, path, steps=6, total_steps=6, resume=checkpoint)
    resumed = train(run, spec, targets, "resumed", checkpoints=rest)
    assert resumed.result.resumed_steps == checkpoint.steps
    assert resumed.result.outputs == whole.result.outputs
    run.modules = {module_id: first.files[module_id] for module_id in run.modules}
    spec = router_spec(run, path, steps=3, total_steps=6, first_step=3, shard_step=3, adam_step=3, phase=1)
    second = train(run, spec, targets, "second", first.files["inner_state"])
    assert second.result.outputs == whole.result.outputs
    assert first.result.step_losses + second.result.step_losses == whole.result.step_losses


class Always(Pace):
    """Whatever it costs."""

    def __init__(self) -> None:
        super().__init__(0.0)

    def is_due(self, since_s: float) -> bool:
        return True


def test_targets_of_other_sequences_or_paths_are_refused(make_run: MakeRun) -> None:
    run = make_run()
    targets, path = write_planted(run), run.add_modules("router")
    with TokenFile.open(targets) as file:
        index = SequenceIndex(file.ids, file.lengths, file.domains, file.documents, tuple(file.domain_names))
        rows = [file.tokens(position).copy() for position in range(file.count)]
    for row in rows:
        row[PREFIX] = P
    write_token_file(run.root / "beyond", index, "uint16", rows)
    with pytest.raises(MalformedRecord, match=f"names path {P} of {P}"):
        train(run, router_spec(run, path), run.root / "beyond", "beyond-out")
    moved = SequenceIndex(index.ids + np.uint64(1), index.lengths, index.domains, index.documents, index.domain_names)
    write_token_file(run.root / "moved", moved, "uint16", rows)
    with pytest.raises(MalformedMessage, match="not in the places of its tokens"):
        train(run, router_spec(run, path), run.root / "moved", "moved-out")


def test_padding_and_tokens_without_a_target_are_ignored(make_run: MakeRun) -> None:
    run = make_run()
    targets, spec = write_planted(run), router_spec(run, run.add_modules("router"))
    with TokenFile.open(run.tokens) as file, TokenFile.open(targets) as labels:
        rows = pack_rows(file.lengths, run.experiment.model.sequence_length)
        indices = np.arange(rows.count)
        taken = batch([file], rows, indices)
        found = NextPath(spec, run.experiment, [labels]).targets(taken, rows, indices)
        expected = sum(int((planted(file.tokens(i)) != NO_TARGET).sum()) for i in range(file.count))
    assert int((found != IGNORED).sum()) == expected
    assert (found[taken.sequence_index < 0] == IGNORED).all()
    assert (found[taken.positions < PREFIX] == IGNORED).all()


def test_the_rate_falls_from_the_whole_to_nothing_without_warm_up() -> None:
    inner = InnerConfig(learning_rate=2.0, warmup_steps=50, rewarm_steps=9, final_learning_rate_ratio=0.5)
    rates = [router_learning_rate(inner, step, 10) for step in (0, 5, 10, 11)]
    assert rates == pytest.approx([2.0, 1.0, 0.0, 0.0], abs=1e-12)
