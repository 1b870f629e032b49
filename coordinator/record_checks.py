"""Whether what a worker made of token files is what its task asked for, before it counts.

Ids, positions, shapes and counts of targets follow from the task's spec and from token files in the store; numbers that
only the worker can know must be finite and possible. Nothing is written. Blocks on files.

Legend: N sequences, C chunks, D features, S choices of a sequence, P paths.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from coordinator.expected import RECORD_BYTES
from coordinator.plan import Plan
from corpus.token_file import BadTokenFile, TokenFile
from model.store import BlobStore
from protocol.errors import RejectedTensor, UnknownBlob
from protocol.tasks import EvaluateSpec, FeaturizeSpec, Message, PackSpec, TaskResult
from routing.positions import counted_targets, num_chunks, sampled_positions
from routing.records import Assignments, Features, Losses, MalformedRecord, Routes, ShardManifest, evaluated_positions

DIVERGED = "the path has diverged (lower inner.learning_rate), or the worker computes wrongly"
# Rounding may take a loss below zero by so many nats a target.
_BELOW_ZERO = 0.1
_LARGEST_LOSS = float(np.finfo(np.float32).max)
# What a record needs beside its arrays: keys, lengths, names of domains.
_KEYS_BYTES, _NAME_BYTES = 4096, 8
_NO_STEPS: dict[str, Any] = {"steps": 0, "step_losses": [], "loss_sum": 0.0, "resumed_steps": 0, "resumed_seconds": 0.0}
_INDEX_BYTES = 32
"""Of each sequence in the index of a token file, at most."""


class RecordChecks:
    """Holds the outputs of tasks that do not train against their specs."""

    def __init__(self, plan: Plan, store: BlobStore) -> None:
        self._experiment, self._mixture, self._store = plan.experiment, plan.mixture, store

    def checked(
        self, task_id: str, spec: Message, result: TaskResult, files: Mapping[str, Path], vocab_size: int
    ) -> TaskResult:
        """The result with the sums that the task's one output (in `files`, by name) bears out.

        Raises RejectedTensor for an output that is not what the spec asks for, UnknownBlob where it is gone meanwhile.
        """
        [(name, path)] = files.items()
        try:
            return result.model_copy(update=_NO_STEPS | self._sums(spec, path, vocab_size))
        except (MalformedRecord, BadTokenFile) as error:
            raise RejectedTensor(f"output {name!r} of task {task_id}: {error}") from None
        except FileNotFoundError:
            raise UnknownBlob(f"output {name!r} of task {task_id} was replaced meanwhile; upload it again") from None

    def _sums(self, spec: Message, path: Path, vocab_size: int) -> dict[str, Any]:
        """Counts and losses that follow from a checked output."""
        if isinstance(spec, PackSpec):
            return self._packed(spec, path, vocab_size)
        assert isinstance(spec, EvaluateSpec | FeaturizeSpec), "TRAIN has tensors, which are checked as they arrive"
        with TokenFile.open(self._store.path(spec.tokens.digest)) as file:
            if isinstance(spec, EvaluateSpec):
                return self._losses(spec, path, file)
            if spec.mode == "sample":
                return self._features(spec, path, file)
            return self._assignments(spec, path, file) if spec.mode == "assign" else self._routes(spec, path, file)

    # --- FEATURIZE ----------------------------------------------------------------------------------------------------

    def _features(self, spec: FeaturizeSpec, path: Path, file: TokenFile) -> dict[str, Any]:
        positions, dim = sampled_positions(file.ids, spec.seed, spec.sample_share), self._experiment.model.hidden_size
        record = Features.from_bytes(_read(path, len(positions) * (8 + 4 * dim)))
        _same("ids", record.ids, file.ids[positions])
        _shape("z", record.z, len(positions), dim)
        _finite("z", record.z)
        return _read_tokens(_first_prefixes(file.lengths[positions], spec.prefix_tokens))

    def _assignments(self, spec: FeaturizeSpec, path: Path, file: TokenFile) -> dict[str, Any]:
        num_shards = self._mixture.num_shards
        choices = min(spec.top_n, num_shards)
        record = Assignments.from_bytes(_read(path, file.count * (8 + 8 * choices)))
        _same("ids", record.ids, file.ids)
        _shape("shards", record.shards, file.count, choices)
        if record.shards.size and int(record.shards.max()) >= num_shards:
            raise MalformedRecord(f"it names shard {int(record.shards.max())} of {num_shards}")
        if (np.diff(np.sort(record.shards, axis=1), axis=1) == 0).any():
            raise MalformedRecord("it names a shard twice for one sequence")
        _finite("distances", record.distances)
        if (record.distances[:, 1:] < record.distances[:, :-1]).any():
            raise MalformedRecord("its shards are not in the order of their distances")
        return _read_tokens(_first_prefixes(file.lengths, spec.prefix_tokens))

    def _routes(self, spec: FeaturizeSpec, path: Path, file: TokenFile) -> dict[str, Any]:
        positions, num_paths = evaluated_positions(file, spec.max_sequences), self._mixture.num_paths
        length = self._experiment.model.sequence_length
        chunks = {interval: num_chunks(length, spec.prefix_tokens, interval) for interval in spec.intervals}
        record = Routes.from_bytes(_read(path, len(positions) * (6 + 4 * num_paths + 2 * sum(chunks.values()))))
        _same("positions", record.positions, positions)
        _shape("posterior", record.posterior, len(positions), num_paths)
        if record.every.keys() != chunks.keys():
            raise MalformedRecord(f"it has routes every {sorted(record.every)} tokens, expected {sorted(chunks)}")
        for interval, paths in record.every.items():
            _shape(f"the routes every {interval} tokens", paths, len(positions), chunks[interval])
        if spec.mode == "look":
            return _read_tokens(file.lengths[positions])
        return _read_tokens(*_prefixes(file.lengths[positions], spec.prefix_tokens, chunks))

    # --- EVALUATE, SCORE and STOP -------------------------------------------------------------------------------------

    def _losses(self, spec: EvaluateSpec, path: Path, file: TokenFile) -> dict[str, Any]:
        if spec.selection is None:
            positions: npt.NDArray[Any] = evaluated_positions(file, spec.max_sequences)
        else:
            positions = np.frombuffer(self._store.path(spec.selection.digest).read_bytes(), "<u4")
        length = self._experiment.model.sequence_length
        count = counted_targets(file.lengths[positions], length, spec.prefix_tokens, spec.chunk_tokens)
        names = sum(len(name.encode()) + _NAME_BYTES for name in file.domain_names)
        record = Losses.from_bytes(_read(path, 6 * len(positions) + 16 * count.size + names))
        _same("positions", record.positions, positions)
        _same("counts", record.count, count)
        if not np.array_equal(record.domains, file.domains[positions]) or record.domain_names != file.domain_names:
            raise MalformedRecord("its domains are not those of the token file")
        _possible(record)
        if spec.tokenizer is None and record.text_bytes.any():
            raise MalformedRecord("it counts bytes without a tokenizer")
        tokens = int(count.sum(dtype=np.int64))
        return {"tokens": tokens, "sequences": len(positions), "loss_sum": float(record.loss.sum())}

    # --- PACK ---------------------------------------------------------------------------------------------------------

    def _packed(self, spec: PackSpec, path: Path, vocab_size: int) -> dict[str, Any]:
        wanted = None
        if spec.manifest is not None:
            wanted = np.unique(ShardManifest.from_bytes(self._store.path(spec.manifest.digest).read_bytes()).ids)
        _check_index(path, RECORD_BYTES + _INDEX_BYTES * (0 if wanted is None else len(wanted)))
        with TokenFile.open(path) as file:
            if wanted is None:
                wanted = np.uint64(spec.range_index << 32) + np.arange(file.count, dtype=np.uint64)
                longest = self._experiment.model.sequence_length
                if file.count and not 2 <= int(file.lengths.min()) <= int(file.lengths.max()) <= longest:
                    raise MalformedRecord(f"it has a sequence that is not of 2 to {longest} tokens")
                _same("ids", file.ids, wanted)
            else:
                _same("ids", file.ids, wanted)
                _same("lengths", file.lengths, self._lengths(spec, wanted))
            if file.largest_token() >= vocab_size:
                raise MalformedRecord(f"it holds token {file.largest_token()} of a vocabulary of {vocab_size}")
            return {"tokens": file.num_tokens, "sequences": file.count}

    def _lengths(self, spec: PackSpec, ids: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint32]:
        """The lengths of sequences in the files that they are gathered from; `ids` ascend."""
        found = np.zeros(len(ids), np.uint32)
        for blob in spec.files:
            with TokenFile.open(self._store.path(blob.digest)) as file:
                places = np.searchsorted(file.ids, ids)
                here = places < file.count
                here[here] = file.ids[places[here]] == ids[here]
                found[here] = file.lengths[places[here]]
        return found


def _first_prefixes(lengths: npt.NDArray[np.uint32], prefix_tokens: int) -> npt.NDArray[Any]:
    """Lengths of what a router reads first: BOS and the prefix."""
    return np.minimum(lengths, prefix_tokens + 1)


def _prefixes(
    lengths: npt.NDArray[np.uint32], prefix_tokens: int, chunks: Mapping[int, int]
) -> Iterator[npt.NDArray[Any]]:
    """Lengths of all that a router of features reads: of a later chunk that is reached, BOS and what precedes it."""
    yield _first_prefixes(lengths, prefix_tokens)
    for interval, count in chunks.items():
        for start in range(prefix_tokens + 1 + interval, prefix_tokens + 1 + count * interval, interval):
            yield np.full(int((lengths > start).sum()), 1 + prefix_tokens)


def _read_tokens(*lengths: npt.NDArray[Any]) -> dict[str, Any]:
    """What has been read, by the lengths of it."""
    return {
        "tokens": sum(int(part.sum(dtype=np.int64)) for part in lengths),
        "sequences": sum(len(part) for part in lengths),
    }


def _read(path: Path, array_bytes: int) -> bytes:
    """The bytes of a record, unless they are more than its arrays and what goes with them may be."""
    size, most = path.stat().st_size, array_bytes + _KEYS_BYTES
    if size > most:
        raise MalformedRecord(f"it has {size} bytes, and what was asked for has at most {most}")
    return path.read_bytes()


def _check_index(path: Path, most: int) -> None:
    """Refuse an index of more than `most` bytes before it is read."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(16)[8:], "little")
    if length > most:
        raise MalformedRecord(f"its index has {length} bytes, and at most {most} are read")


def _same(what: str, found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> None:
    if not np.array_equal(found, expected):
        raise MalformedRecord(f"its {what} are not those that the task asked for")


def _shape(what: str, found: npt.NDArray[Any], *expected: int) -> None:
    if found.shape != expected:
        raise MalformedRecord(f"{what} has shape {found.shape}, expected {expected}")


def _finite(what: str, values: npt.NDArray[np.float32]) -> None:
    if not np.isfinite(values).all():
        raise MalformedRecord(f"{what} holds a value that is not finite: {DIVERGED}")


def _possible(record: Losses) -> None:
    """Raises MalformedRecord for losses that no path can have."""
    if not np.isfinite(record.loss).all():
        raise MalformedRecord(f"it holds a loss that is not finite: {DIVERGED}")
    least, most = -_BELOW_ZERO * record.count, _LARGEST_LOSS * record.count
    if (record.loss < least).any() or (record.loss > most).any():
        raise MalformedRecord("it holds a loss that is below zero, or larger than its targets can have")
    if record.text_bytes[record.count == 0].any():
        raise MalformedRecord("it counts bytes where there are no targets")
