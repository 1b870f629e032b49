"""Steps modules on files: contributions and outer state are read chunk by chunk, new versions written to the store.

Memory is a few chunks, whatever the size of the module and the number of contributions; files are read, not mapped, so
that nothing lingers in the resident set. The contiguous prefix of a module's contributions is summed as they arrive
(DiPaCo, 2403.10616, Sec 3.3: online accumulation), in shard order all the same: the result has the bits of a sum taken
at the end. Sums are scratch: after a restart the step reads every contribution again. Robust averages have no sums: the
step reads the same chunk of every contribution at once, in chunks that are smaller by their number.
"""

from __future__ import annotations

import math
import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from configs.schema import OuterConfig
from coordinator.outer import Chunk, NoContributions, add_weighted, gradient_scale, nesterov_step, squared_norm
from coordinator.partial_sum import CHUNK_ELEMENTS, Contribution, FlatFile, PartialSum, chunk_spans
from coordinator.robust import Average, robust_average
from model import tensor_file
from model.layout import ModuleSpec, TensorSpec
from model.store import BlobStore

# Model and module id.
ModuleKey = tuple[str, str]


class NonFiniteStep(ValueError):
    """An outer step whose parameters, momentum or outer gradient are not finite."""


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """Digest and size of a new version's parameters and momentum, and the L2 norm of the outer gradient applied."""

    params: tuple[str, int]
    momentum: tuple[str, int] | None
    outer_gradient_norm: float


class _Gradient:
    """The outer gradient of a step, chunk by chunk: the partial sum, if it fits, then the other contributions."""

    def __init__(
        self, spec: ModuleSpec, contributions: Sequence[Contribution], scale: float, partial: PartialSum | None
    ) -> None:
        self._partial = partial if partial is not None and _is_prefix(partial, spec, contributions) else None
        summed = len(self._partial.contributions) if self._partial else 0
        self._others = [(weight, FlatFile(path, spec.tensors)) for weight, path in contributions[summed:]]
        self._scale = np.float32(scale)

    def read(self, first: int, count: int) -> Chunk:
        total = self._partial.read(first, count) if self._partial else None
        for weight, outer_gradient in self._others:
            total = add_weighted(total, outer_gradient.read(first, count), weight)
        assert total is not None
        scaled: Chunk = total * self._scale
        return scaled


class _RobustGradient:
    """The outer gradient of a step, chunk by chunk, as a coordinate-wise average that a few wrong ones do not move."""

    def __init__(self, spec: ModuleSpec, contributions: Sequence[Contribution], scale: float, average: Average) -> None:
        self._weights = [weight for weight, _ in contributions]
        self._outer_gradients = [FlatFile(path, spec.tensors) for _, path in contributions]
        self._scale = np.float32(scale)
        self._average = average

    def read(self, first: int, count: int) -> Chunk:
        chunks = np.stack([outer_gradient.read(first, count) for outer_gradient in self._outer_gradients])
        averaged: Chunk = self._average(chunks, self._weights) * self._scale
        return averaged


def _is_prefix(partial: PartialSum, spec: ModuleSpec, contributions: Sequence[Contribution]) -> bool:
    summed = partial.contributions
    return bool(summed) and partial.tensors == spec.tensors and summed == list(contributions[: len(summed)])


@np.errstate(over="ignore", invalid="ignore")  # what overflows is refused below, with a name
def step_module(
    spec: ModuleSpec,
    params: Path,
    momentum: Path | None,
    contributions: Sequence[Contribution],
    outer: OuterConfig,
    out_params: Path,
    out_momentum: Path,
    chunk_elements: int = CHUNK_ELEMENTS,
    partial: PartialSum | None = None,
) -> StepOutcome:
    """One Nesterov step of a module from files to files; `contributions` in shard order.

    Raises TensorMismatch for files that do not hold the module's tensors, NoContributions, and NonFiniteStep.
    """
    scale = gradient_scale(len(contributions), outer.rescale)
    average = robust_average(outer, len(contributions))
    if average is None:
        gradient: _Gradient | _RobustGradient = _Gradient(spec, contributions, scale, partial)
    else:
        gradient = _RobustGradient(spec, contributions, scale, average)
        chunk_elements = max(1, chunk_elements // len(contributions))
    old_params = FlatFile(params, spec.tensors)
    old_momentum = FlatFile(momentum, spec.tensors) if momentum is not None else None
    squares = 0.0
    with (
        tensor_file.Writer(out_params, spec.tensors) as params_writer,
        tensor_file.Writer(out_momentum, spec.tensors) as momentum_writer,
    ):
        for first, count in chunk_spans(spec.num_elements, chunk_elements):
            chunk = gradient.read(first, count)
            buffer = old_momentum.read(first, count) if old_momentum else None
            stepped, buffer = nesterov_step(
                old_params.read(first, count), buffer, chunk, outer.learning_rate, outer.momentum
            )
            _check_finite(spec, stepped, buffer)
            params_writer.append(stepped)
            momentum_writer.append(buffer)
            squares += squared_norm(chunk)
        return StepOutcome(params_writer.finish(), momentum_writer.finish(), math.sqrt(squares))


def _check_finite(spec: ModuleSpec, *chunks: Chunk) -> None:
    if not all(np.isfinite(chunk).all() for chunk in chunks):
        raise NonFiniteStep(
            f"the outer step of module {spec.module_id} is not finite; lower outer.learning_rate or inner.learning_rate"
        )


def distance(spec: ModuleSpec, start: Path, end: Path, chunk_elements: int = CHUNK_ELEMENTS) -> float:
    """The L2 norm of start minus end of two tensor files of a module."""
    left, right = FlatFile(start, spec.tensors), FlatFile(end, spec.tensors)
    spans = chunk_spans(spec.num_elements, chunk_elements)
    return math.sqrt(sum(squared_norm(left.read(*span) - right.read(*span)) for span in spans))


@dataclass(slots=True)
class _Pending:
    """The contributions to one version of a module that have come, and the sum of those that are next in line."""

    order: list[int]
    sum: PartialSum | None = None
    arrived: dict[int, Contribution] = field(default_factory=dict)


class Executor:
    """Owns the sums of modules between versions. Its calls block on files and may come from any thread."""

    def __init__(self, store: BlobStore, scratch: Path, chunk_elements: int = CHUNK_ELEMENTS) -> None:
        self._store = store
        self._chunk_elements = chunk_elements
        self._scratch = scratch
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        self._lock = threading.Lock()
        self._locks: dict[ModuleKey, threading.Lock] = {}
        self._pending: dict[ModuleKey, tuple[int, _Pending]] = {}
        self._stepped: dict[ModuleKey, int] = {}

    def add(self, key: ModuleKey, version: int, order: Sequence[int], shard: int, weight: float, path: Path) -> None:
        """A contribution of `shard` to the step from `version` is there: extend the sum as far as shard order allows.

        `order` names all shards that contribute. Repeating a call, or making it after the step, changes nothing.
        """
        with self._lock_of(key):
            pending = self._pending_of(key, version, order)
            if pending is None:
                return
            pending.arrived.setdefault(shard, (weight, path))
            if pending.sum is None:
                tensors = [TensorSpec(name, shape) for name, shape in tensor_file.shapes(path).items()]
                pending.sum = PartialSum(self._scratch / _scratch_name(key), tensors, self._chunk_elements)
            while (done := len(pending.sum.contributions)) < len(pending.order):
                following = pending.arrived.get(pending.order[done])
                if following is None:
                    break
                pending.sum.add(*following)

    def step(
        self,
        key: ModuleKey,
        version: int,
        spec: ModuleSpec,
        params_path: Path,
        momentum_path: Path | None,
        contributions: Sequence[Contribution],
        outer: OuterConfig,
    ) -> StepOutcome:
        """The version after `version`, durable in the store before this returns; repeating it gives the same digests.

        `assign` takes its one contribution as it is: the same blob, no momentum. Raises what `step_module` does.
        """
        with self._lock_of(key):
            if outer.kind == "assign":
                outcome = self._assign(spec, params_path, contributions)
            else:
                aside = self._store.scratch()
                files = aside / "params", aside / "momentum"
                try:
                    outcome = step_module(
                        spec,
                        params_path,
                        momentum_path,
                        contributions,
                        outer,
                        *files,
                        self._chunk_elements,
                        self._sum_of(key, version),
                    )
                    self._adopt(outcome, *files)
                finally:
                    shutil.rmtree(aside, ignore_errors=True)
            self._stepped[key] = max(version, self._stepped.get(key, version))
            self._drop(key, version)
            return outcome

    def _assign(self, spec: ModuleSpec, params_path: Path, contributions: Sequence[Contribution]) -> StepOutcome:
        if len(contributions) != 1:
            raise NoContributions(
                f"outer.kind 'assign' takes 1 contribution to module {spec.module_id}, not {len(contributions)}"
            )
        _, path = contributions[0]
        digest = path.name  # a blob is named by its digest; the store answers for one that is not there
        moved = distance(spec, params_path, path, self._chunk_elements)
        return StepOutcome((digest, self._store.size(digest)), None, moved)

    def _adopt(self, outcome: StepOutcome, new_params: Path, new_momentum: Path) -> None:
        assert outcome.momentum is not None
        self._store.adopt(new_momentum, outcome.momentum[0])
        self._store.adopt(new_params, outcome.params[0])

    def _lock_of(self, key: ModuleKey) -> threading.Lock:
        with self._lock:
            return self._locks.setdefault(key, threading.Lock())

    def _sum_of(self, key: ModuleKey, version: int) -> PartialSum | None:
        held = self._pending.get(key)
        return held[1].sum if held is not None and held[0] == version else None

    def _pending_of(self, key: ModuleKey, version: int, order: Sequence[int]) -> _Pending | None:
        """What is known of the step from `version`; None where it was taken already."""
        if version <= self._stepped.get(key, -1):
            return None
        held = self._pending.get(key)
        if held is None or held[0] != version or held[1].order != list(order):
            if held is not None and held[0] > version:
                return None
            self._drop(key, version)
            held = self._pending[key] = (version, _Pending(list(order)))
        return held[1]

    def _drop(self, key: ModuleKey, version: int) -> None:
        """Forget what is known of steps from `version` or before it."""
        held = self._pending.get(key)
        if held is not None and held[0] <= version:
            del self._pending[key]
            if held[1].sum is not None:
                held[1].sum.remove()


def _scratch_name(key: ModuleKey) -> str:
    """One file name per module: the schema keeps separators out of model names."""
    return f"{'.'.join(key)}.sum"
