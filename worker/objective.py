"""What a TRAIN task teaches: the next token, or, for the router LM, the path that is best for what follows.

The router LM (DiPaCo, 2403.10616, Sec 2.4.3 and 7.2.2) is a path like any other, forked from the base. Its classes are
the first P tokens of the vocabulary: the softmax runs over those rows of the head alone. So it is, tensor for tensor, a
model of the topology, and leases, checkpoints, digests and stores need to know nothing of it.

Legend: B rows of a batch, T tokens of a row, P paths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Int64

from configs.schema import Experiment
from corpus.rows import IGNORED, Batch, Rows, batch
from corpus.token_file import TokenFile
from protocol.tasks import MalformedMessage, TrainSpec
from routing.records import MalformedRecord
from routing.targets import NO_TARGET
from worker.schedule import learning_rate, router_learning_rate
from worker.task_path import BASE, MIXTURE, topology_of


class Objective(Protocol):
    """`num_classes`: the first rows of the head that take part in the softmax (None: all of them)."""

    num_classes: int | None

    def targets(self, taken: Batch, rows: Rows, indices: Int64[np.ndarray, " B"]) -> Int64[np.ndarray, "B T"]:
        """The class that every token is to predict; IGNORED where there is none."""
        ...

    def learning_rate(self, step: int) -> float:
        """The rate of the step with this counter."""
        ...


class NextToken:
    """The language model's own objective."""

    num_classes: int | None = None

    def __init__(self, spec: TrainSpec, experiment: Experiment) -> None:
        self._inner, self._total_steps = experiment.inner, spec.total_steps
        self._prefix_tokens = 0 if experiment.inner.train_on_prefix else experiment.sharding.prefix_tokens
        self._fork_step = _renewed_at(spec, experiment) if spec.path.model != BASE else None

    def targets(self, taken: Batch, rows: Rows, indices: Int64[np.ndarray, " B"]) -> Int64[np.ndarray, "B T"]:
        return taken.targets(self._prefix_tokens)

    def learning_rate(self, step: int) -> float:
        return learning_rate(self._inner, step, self._total_steps, self._fork_step)


class NextPath:
    """The router LM's: `labels` hold a path, or NO_TARGET, in the place of every token of the shard."""

    def __init__(self, spec: TrainSpec, experiment: Experiment, labels: Sequence[TokenFile]) -> None:
        self.num_classes: int | None = topology_of(experiment, MIXTURE).num_paths
        self._inner, self._total_steps = experiment.inner, spec.total_steps
        self._labels = labels

    def targets(self, taken: Batch, rows: Rows, indices: Int64[np.ndarray, " B"]) -> Int64[np.ndarray, "B T"]:
        """Raises MalformedRecord for a path that there is not."""
        labels = batch(self._labels, rows, indices).tokens
        targets = np.where((taken.sequence_index >= 0) & (labels != NO_TARGET), labels, IGNORED)
        if int(targets.max()) >= (self.num_classes or 0):
            raise MalformedRecord(f"a target names path {int(targets.max())} of {self.num_classes}")
        return targets

    def learning_rate(self, step: int) -> float:
        return router_learning_rate(self._inner, step, self._total_steps)


def objective_of(
    spec: TrainSpec, experiment: Experiment, token_files: Sequence[TokenFile], labels: Sequence[TokenFile]
) -> Objective:
    """Raises MalformedMessage where the labels are not those of the sequences."""
    if spec.objective == "lm":
        return NextToken(spec, experiment)
    if [_index(file) for file in token_files] != [_index(file) for file in labels]:
        raise MalformedMessage("the targets of a router are not in the places of its tokens")
    return NextPath(spec, experiment, labels)


def _index(file: TokenFile) -> tuple[bytes, bytes]:
    return file.ids.tobytes(), file.lengths.tobytes()


def _renewed_at(spec: TrainSpec, experiment: Experiment) -> int:
    """The path's step at which its data changed last, and its learning rate warms up again: its fork, or a re-shard.

    Only the mixture is ever given other data after the fork.
    """
    phases = experiment.first_phase(spec.phase) if spec.path.model == MIXTURE else 0
    return spec.first_step - (spec.phase - phases) * spec.steps
