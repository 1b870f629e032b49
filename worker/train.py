"""TRAIN: inner steps of one shard on its path, and what they contribute to every module of the path.

A pure function of module versions, token files, inner state and spec (DiPaCo, 2403.10616, Algorithm 1, inner loop).
Master weights are float32; the loss of a step is a sum over the whole batch's targets divided by their count, however
the batch is cut into micro-batches.

Legend: B rows of a micro-batch, T tokens of a row.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from configs.schema import Experiment
from corpus.rows import IGNORED, Batch, batch, pack_rows
from corpus.token_file import TokenFile
from model import tensor_file
from model.layout import level_tensors
from model.transformer import PathModel
from protocol.tasks import BlobRef, Checkpoint, TaskResult, TrainSpec
from worker.checkpoints import Checkpoints, Snapshot
from worker.inner_optimizer import InnerOptimizer, NonFiniteStep
from worker.numerics import Compute, applied
from worker.objective import Objective, objective_of
from worker.outcome import HandedBack, Progress, TaskOutcome, no_progress
from worker.task_path import path_for_task, topology_of

INNER_STATE = "inner_state"


def run_train(
    spec: TrainSpec,
    experiment: Experiment,
    vocab_size: int,
    module_paths: Mapping[str, Path],
    token_paths: Sequence[Path],
    inner_state_path: Path | None,
    out_dir: Path,
    progress: Progress = no_progress,
    checkpoints: Checkpoints | None = None,
    target_paths: Sequence[Path] = (),
) -> TaskOutcome:
    """Run the task; outputs a contribution a module id (start minus end; `assign`: the end) and, if kept, inner_state.

    `module_paths`: one file per module id of the path. `checkpoints` takes partial progress on the way, and holds that
    of an earlier holder where the spec has one. `target_paths`: what stands in the places of the tokens, for objective
    `router`. Raises NonFiniteStep, TensorMismatch, UnsupportedNumerics; MalformedMessage and MalformedRecord for
    targets of other tokens or paths.
    """
    begin = time.monotonic()
    with applied(spec.numerics) as compute, ExitStack() as files:
        token_files = [files.enter_context(TokenFile.open(item)) for item in token_paths]
        labels = [files.enter_context(TokenFile.open(item)) for item in target_paths]
        objective = objective_of(spec, experiment, token_files, labels)
        path = path_for_task(spec.path, experiment, vocab_size, module_paths, compute)
        trainer = Trainer(spec, experiment, path, compute, objective)
        tally = Tally()
        if spec.resume is not None and checkpoints is not None and checkpoints.resume_path is not None:
            tally = trainer.resume(spec.resume, checkpoints.resume_path)
        elif inner_state_path is not None:
            trainer.optimizer.restore(inner_state_path, spec.adam_step)
        resumed_steps, resumed_s = len(tally.step_losses), tally.seconds
        trainer.run(token_files, tally, progress, checkpoints)
        written = _write_outputs(spec, experiment, vocab_size, module_paths, trainer, out_dir)
    result = TaskResult(
        outputs={name: blob for name, (_, blob) in written.items()},
        tokens=tally.tokens,
        sequences=tally.rows,
        steps=spec.steps,
        loss_sum=tally.loss_sum,
        step_losses=tally.step_losses,
        seconds=resumed_s + time.monotonic() - begin,
        resumed_steps=resumed_steps,
        resumed_seconds=resumed_s,
    )
    return TaskOutcome({name: file for name, (file, _) in written.items()}, result)


@dataclass(slots=True)
class Tally:
    """What the steps of a task add up to; `seconds` are those of the steps that were taken over."""

    tokens: int = 0
    rows: int = 0
    loss_sum: float = 0.0
    step_losses: list[float] = field(default_factory=list)
    seconds: float = 0.0


class Trainer:
    """Inner steps on one path in memory."""

    def __init__(
        self, spec: TrainSpec, experiment: Experiment, path: PathModel, compute: Compute, objective: Objective
    ) -> None:
        self._spec, self._experiment, self._compute = spec, experiment, compute
        self._objective = objective
        self.path = path.train()
        self.path.checkpoint_activations = compute.checkpoint_activations
        self.optimizer = InnerOptimizer(dict(path.named_parameters()), experiment.inner)
        if compute.compile:
            for block in path.model.layers:  # one by one: they share what is compiled, and packing stays outside
                block.compile()

    def resume(self, checkpoint: Checkpoint, path: Path) -> Tally:
        """Become what an earlier holder was after its steps; raises TensorMismatch where it is another model's."""
        tensors = tensor_file.read(path, self._checkpoint_specs())
        with torch.no_grad():
            for name, parameter in self.path.named_parameters():
                parameter.copy_(torch.from_numpy(tensors[f"p.{name}"]))
        self.optimizer.load(tensors, self._spec.adam_step + checkpoint.steps)
        losses, seconds = list(checkpoint.step_losses), checkpoint.seconds
        return Tally(checkpoint.tokens, checkpoint.sequences, checkpoint.loss_sum, losses, seconds)

    def run(
        self, token_files: Sequence[TokenFile], tally: Tally, progress: Progress, checkpoints: Checkpoints | None = None
    ) -> None:
        """Take the steps of the spec that the tally lacks; raises NonFiniteStep, and what `progress` raises between."""
        lengths = np.concatenate([file.lengths for file in token_files])
        rows = pack_rows(lengths, self._experiment.model.sequence_length)
        take = partial(self._snapshot, tally, time.monotonic())
        copy_bytes = sum(tensor.numel() * 4 for tensor in self.path.parameters()) + self.optimizer.num_bytes
        if checkpoints is not None:
            checkpoints.begin()
        for index in range(len(tally.step_losses), self._spec.steps):
            indices = rows.batch_rows(
                self._spec.order_seed, self._spec.shard_step + index, self._experiment.inner.batch_rows
            )
            taken = batch(token_files, rows, indices)
            targets = self._objective.targets(taken, rows, indices)
            loss_sum, count = self.step(taken, targets, self._spec.first_step + index)
            tally.tokens += count
            tally.rows += len(taken.tokens)
            tally.loss_sum += loss_sum
            tally.step_losses.append(loss_sum / count)
            unfinished = index + 1 < self._spec.steps
            if checkpoints is not None and unfinished:
                checkpoints.offer(take, copy_bytes)
            try:
                progress(index + 1, tally.step_losses[-1], tally.tokens)
            except HandedBack:
                if checkpoints is not None and unfinished:
                    checkpoints.hand_over(take, copy_bytes, index + 1)
                raise

    def _snapshot(self, tally: Tally, began_s: float) -> Snapshot:
        """A copy of parameters and moments after the steps of the tally."""
        parameters = ((f"p.{name}", tensor.detach().cpu().numpy()) for name, tensor in self.path.named_parameters())
        tensors = {name: values.copy() for name, values in (*parameters, *self.optimizer.moments())}
        seconds = tally.seconds + time.monotonic() - began_s
        return Snapshot(tensors, tally.tokens, tally.rows, tally.loss_sum, list(tally.step_losses), seconds)

    def _checkpoint_specs(self) -> list[tuple[str, tuple[int, ...]]]:
        parameters = [(f"p.{name}", tuple(tensor.shape)) for name, tensor in self.path.named_parameters()]
        return [*parameters, *self.optimizer.specs]

    def step(self, rows: Batch, targets: np.ndarray, step: int) -> tuple[float, int]:
        """One inner step with counter `step`; returns the summed loss in nats over all targets, and their count."""
        count = max(1, int(np.count_nonzero(targets != IGNORED)))
        losses = [self._backward(micro, count) for micro in self._micro_batches(rows, targets)]
        *sums, norm = torch.stack([*losses, self.optimizer.clip()]).tolist()  # the one wait for the device in a step
        loss_sum = math.fsum(sums)
        if not (math.isfinite(loss_sum) and math.isfinite(norm)):
            raise self._not_finite(step, loss_sum / count, norm)
        self.optimizer.step(self._objective.learning_rate(step))
        return loss_sum, count

    def _micro_batches(self, rows: Batch, targets: np.ndarray) -> Iterator[tuple[torch.Tensor, ...]]:
        """(tokens, targets, counted, positions, sequence_index), each (B, T), on the device."""
        arrays = (rows.tokens, targets, targets != IGNORED, rows.positions, rows.sequence_index)
        size = self._spec.numerics.micro_batch_rows or len(rows.tokens)
        for first in range(0, len(rows.tokens), size):
            parts = (torch.from_numpy(array[first : first + size]) for array in arrays)
            yield tuple(part.to(self._compute.device) for part in parts)

    def _backward(self, micro: tuple[torch.Tensor, ...], count: int) -> torch.Tensor:
        """Add a micro-batch's share of the gradient of the mean loss; returns its summed loss, on the device."""
        with self._compute.autocast():
            loss_sum = self._loss_sum(*micro)
        (loss_sum / count).backward()  # type: ignore[no-untyped-call]
        return loss_sum.detach()

    def _loss_sum(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor,
        counted: torch.Tensor,
        positions: torch.Tensor,
        sequence_index: torch.Tensor,
    ) -> torch.Tensor:
        hidden = self.path(tokens, positions, sequence_index)
        loss_sum, _ = self.path.loss_sum_and_count(hidden, targets, counted, self._objective.num_classes)
        return loss_sum

    def _not_finite(self, step: int, loss: float, gradient_norm: float) -> NonFiniteStep:
        spec, inner = self._spec, self._experiment.inner
        topology = topology_of(self._experiment, spec.path.model)
        what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {gradient_norm}"
        return NonFiniteStep(
            f"{what} on path {topology.path_id(spec.path.path_index)} of model {spec.path.model!r} "
            f"(shard {spec.shard}, phase {spec.phase}, step {step}): lower inner.learning_rate "
            f"({inner.learning_rate}), raise inner.warmup_steps ({inner.warmup_steps}) or set model.qk_norm"
        )


def _write_outputs(
    spec: TrainSpec,
    experiment: Experiment,
    vocab_size: int,
    module_paths: Mapping[str, Path],
    trainer: Trainer,
    out_dir: Path,
) -> dict[str, tuple[Path, BlobRef]]:
    """Contribution of every module and the inner state: name -> (file, reference)."""
    written: dict[str, tuple[Path, BlobRef]] = {}
    topology = topology_of(experiment, spec.path.model)
    end = dict(trainer.path.named_parameters())
    for module_id in topology.modules_of_path(spec.path.path_index):
        tensors = level_tensors(experiment.model, vocab_size, topology.level_of_module(module_id))
        start = tensor_file.open_flat(module_paths[module_id], tensors)
        file = out_dir / module_id
        offset = 0
        with tensor_file.Writer(file, tensors) as writer:
            for tensor in tensors:
                values = end[tensor.name].detach().cpu().contiguous().view(-1).numpy()
                if spec.outer == "nesterov":  # the outer gradient: start minus end
                    values = start[offset : offset + values.size] - values
                writer.append(values)
                offset += tensor.num_elements
            digest, size = writer.finish()
        written[module_id] = (file, BlobRef(digest=digest, size=size))
    if experiment.inner.inner_state == "keep":
        digest, size = trainer.optimizer.save(out_dir / INNER_STATE)
        written[INNER_STATE] = (out_dir / INNER_STATE, BlobRef(digest=digest, size=size))
    return written
