"""TRAIN as a function: exact continuation, micro-batches, the sign of contributions, errors that help."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from corpus.rows import batch, pack_rows
from corpus.token_file import TokenFile
from model import tensor_file
from model.path import load_path
from protocol.tasks import Numerics, PathRef, TrainSpec
from worker.inner_optimizer import NonFiniteStep
from worker.outcome import TaskOutcome, TaskStopped
from worker.schedule import learning_rate
from worker.task_path import topology_of
from worker.train import run_train

if TYPE_CHECKING:
    from tests.worker.conftest import MakeRun, TinyRun


def train(run: TinyRun, spec: TrainSpec, name: str, inner_state: Path | None = None) -> TaskOutcome:
    out_dir = run.root / name
    out_dir.mkdir()
    return run_train(spec, run.experiment, run.vocab_size, run.modules, [run.tokens], inner_state, out_dir)


def flat(outcome: TaskOutcome, names: tuple[str, ...]) -> np.ndarray:
    parts = [tensor.reshape(-1) for name in names for tensor in tensor_file.read(outcome.files[name]).values()]
    return np.concatenate(parts)


@pytest.mark.parametrize(("optimizer", "outer"), [("adamw", "assign"), ("adamw", "nesterov"), ("muon", "assign")])
def test_continues_exactly_from_module_and_inner_state(make_run: MakeRun, optimizer: str, outer: str) -> None:
    run = make_run(inner={"optimizer": optimizer})
    path = run.add_modules("base")
    whole = train(run, run.train_spec(path, steps=8, outer="assign"), "whole")
    first = train(run, run.train_spec(path, steps=4, outer="assign"), "first")
    start = dict(run.modules)
    run.modules = {module_id: first.files[module_id] for module_id in start}
    state = first.files["inner_state"]
    spec = run.train_spec(path, steps=4, outer=outer, first_step=4, shard_step=4, adam_step=4)
    second = train(run, spec, "second", state)

    assert second.result.outputs["inner_state"] == whole.result.outputs["inner_state"]
    assert first.result.step_losses + second.result.step_losses == whole.result.step_losses
    if outer == "assign":
        assert second.result.outputs == whole.result.outputs
    else:
        for module_id in start:
            middle, contribution = flat(first, (module_id,)), flat(second, (module_id,))
            np.testing.assert_array_equal(contribution, middle - flat(whole, (module_id,)))


def test_forgetting_the_inner_state_shows(make_run: MakeRun) -> None:
    run = make_run()
    path = run.add_modules("base")
    first = train(run, run.train_spec(path), "first")
    again = run.train_spec(path, first_step=4, shard_step=4, adam_step=4)
    kept = train(run, again, "kept", first.files["inner_state"])
    reset = train(run, run.train_spec(path, first_step=4, shard_step=4), "reset")
    assert kept.result.outputs["0.0"] != reset.result.outputs["0.0"]


def reference(run: TinyRun, path: PathRef, steps: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The inner loop written out: parameters after `steps` steps, and the losses."""
    inner = run.experiment.inner
    model = load_path(run.experiment.model, run.vocab_size, topology_of(run.experiment, path.model), run.modules)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and n != "model.embed_tokens.weight"]
    others = [p for n, p in model.named_parameters() if p.ndim == 1 or n == "model.embed_tokens.weight"]
    groups = [{"params": matrices, "weight_decay": inner.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(inner.beta1, inner.beta2), eps=inner.eps)
    losses = []
    with TokenFile.open(run.tokens) as file:
        rows = pack_rows(file.lengths, run.experiment.model.sequence_length)
        for step in range(steps):
            taken = batch([file], rows, rows.batch_rows(7, step, inner.batch_rows))
            loss = torch.zeros(())
            count = 0
            for line in range(len(taken.tokens)):  # sequence by sequence: attention cannot cross
                for index in range(int(taken.sequence_index[line].max()) + 1):
                    tokens = torch.from_numpy(taken.tokens[line][taken.sequence_index[line] == index])
                    logits = model.logits(model(tokens[None]))[0]
                    loss = loss + F.cross_entropy(logits[:-1], tokens[1:], reduction="sum")
                    count += len(tokens) - 1
            optimizer.zero_grad()
            (loss / count).backward()  # type: ignore[no-untyped-call]
            assert inner.clip_norm is not None
            torch.nn.utils.clip_grad_norm_(model.parameters(), inner.clip_norm)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(inner, step, 20)
            optimizer.step()
            losses.append(float(loss.detach()) / count)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, losses


def test_equals_a_plain_loop_over_single_sequences(make_run: MakeRun) -> None:
    run = make_run()
    path = run.add_modules("base")
    expected, losses = reference(run, path, steps=4)
    outcome = train(run, run.train_spec(path, outer="assign"), "out")
    np.testing.assert_allclose(outcome.result.step_losses, losses, rtol=1e-5)
    for module_id in ("0.0", "1.0"):
        for name, tensor in tensor_file.read(outcome.files[module_id]).items():
            np.testing.assert_allclose(tensor, expected[name].numpy(), atol=2e-5, err_msg=name)


@pytest.mark.parametrize("micro_batch_rows", [1, 3])
def test_micro_batches_equal_the_whole_batch(make_run: MakeRun, micro_batch_rows: int) -> None:
    run = make_run()
    path = run.add_modules("base")
    numerics = Numerics(device="cpu", micro_batch_rows=micro_batch_rows)
    one_step = {"steps": 1, "outer": "assign"}
    whole = train(run, run.train_spec(path, **one_step), "whole")
    cut = train(run, run.train_spec(path, numerics=numerics, **one_step), "cut")
    assert cut.result.loss_sum == pytest.approx(whole.result.loss_sum, rel=1e-6)
    moments = tensor_file.read(whole.files["inner_state"])
    for name, tensor in tensor_file.read(cut.files["inner_state"]).items():
        np.testing.assert_allclose(tensor, moments[name], atol=1e-6, err_msg=name)


def test_contribution_is_start_minus_end(make_run: MakeRun) -> None:
    run = make_run()
    path = run.add_modules("mixture", path_index=1)
    assert set(run.modules) == {"0.0", "1.1"}
    end = train(run, run.train_spec(path, outer="assign"), "end")
    contribution = train(run, run.train_spec(path, outer="nesterov"), "contribution")
    for module_id, file in run.modules.items():
        start = tensor_file.read(file)
        for name, tensor in tensor_file.read(contribution.files[module_id]).items():
            np.testing.assert_array_equal(tensor, start[name] - tensor_file.read(end.files[module_id])[name])
            assert np.any(tensor != 0), name


def test_result_counts_and_names(make_run: MakeRun) -> None:
    run = make_run()
    seen: list[tuple[int, float, int]] = []
    spec = run.train_spec(run.add_modules("base"))
    outcome = run_train(
        spec, run.experiment, run.vocab_size, run.modules, [run.tokens], None, run.root, lambda *beat: seen.append(beat)
    )
    result = outcome.result
    assert set(result.outputs) == set(outcome.files) == {"0.0", "1.0", "inner_state"}
    assert [steps for steps, _, _ in seen] == [1, 2, 3, 4]
    assert seen[-1][2] == result.tokens
    assert [loss for _, loss, _ in seen] == result.step_losses
    with TokenFile.open(run.tokens) as file:
        rows = pack_rows(file.lengths, run.experiment.model.sequence_length)
        used = np.concatenate([rows.batch_rows(7, step, 4) for step in range(4)])
        targets = sum(int((file.lengths[rows.sequences(int(row))] - 1).sum()) for row in used)
    assert result.tokens == targets
    assert result.loss_sum / targets == pytest.approx(np.mean(result.step_losses), rel=0.05)


def test_inner_state_is_dropped_where_it_is_reset(make_run: MakeRun) -> None:
    run = make_run(inner={"inner_state": "reset"})
    outcome = train(run, run.train_spec(run.add_modules("base")), "out")
    assert set(outcome.files) == {"0.0", "1.0"}


def test_prefix_targets_can_be_left_out(make_run: MakeRun) -> None:
    run = make_run(inner={"train_on_prefix": False})
    spec = run.train_spec(run.add_modules("base"), steps=1)
    outcome = train(run, spec, "out")
    with TokenFile.open(run.tokens) as file:
        rows = pack_rows(file.lengths, run.experiment.model.sequence_length)
        used = [file.lengths[rows.sequences(int(row))].astype(int) for row in rows.batch_rows(7, 0, 4)]
    assert outcome.result.tokens == sum(int(np.maximum(lengths - 1 - 32, 0).sum()) for lengths in used)


def test_checkpointed_activations_change_no_bit(make_run: MakeRun) -> None:
    run = make_run()
    path = run.add_modules("base")
    plain = train(run, run.train_spec(path), "plain")
    numerics = Numerics(device="cpu", checkpoint_activations=True)
    checkpointed = train(run, run.train_spec(path, numerics=numerics), "checkpointed")
    assert checkpointed.result.outputs == plain.result.outputs


def test_bfloat16_is_near_and_keeps_float32_master_weights(make_run: MakeRun) -> None:
    run = make_run()
    path = run.add_modules("base")
    plain = train(run, run.train_spec(path), "plain")
    half = train(run, run.train_spec(path, numerics=Numerics(device="cpu", dtype="bfloat16")), "half")
    np.testing.assert_allclose(half.result.step_losses, plain.result.step_losses, rtol=0.02)
    assert half.result.outputs["0.0"] != plain.result.outputs["0.0"]


def test_a_step_that_is_not_finite_names_where_and_which_knob(make_run: MakeRun) -> None:
    run = make_run()
    spec = run.train_spec(run.add_modules("mixture", path_index=2), shard=2, phase=3, first_step=11)
    tensors = {name: tensor.copy() for name, tensor in tensor_file.read(run.modules["1.0"]).items()}
    tensors["model.norm.weight"][0] = np.nan
    tensor_file.write(run.modules["1.0"], tensors)
    with pytest.raises(NonFiniteStep, match=r"path 1\.0 .*shard 2, phase 3, step 11.*inner\.learning_rate"):
        train(run, spec, "out")


def test_stops_between_steps(make_run: MakeRun) -> None:
    run = make_run()
    spec = run.train_spec(run.add_modules("base"))

    def stop(steps: int, loss: float, tokens: int) -> None:
        if steps == 2:
            raise TaskStopped

    out_dir = run.root / "out"
    out_dir.mkdir()
    with pytest.raises(TaskStopped):
        run_train(spec, run.experiment, run.vocab_size, run.modules, [run.tokens], None, out_dir, stop)
    assert not list(out_dir.iterdir())
