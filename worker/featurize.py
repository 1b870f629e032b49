"""FEATURIZE: features z of the sequences of a token file under the base path, and what the router makes of them.

What is batched together follows from the file and the spec alone, so neither the machine nor the number of workers
changes a bit of z.

Legend: N sequences, D features, C chunks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from configs.schema import Experiment
from corpus.token_file import TokenFile
from protocol.tasks import FeaturizeSpec, MalformedMessage, TaskResult
from routing.features import features_of, first_prefix, prefix_before
from routing.frozen import FrozenRouter, read_router
from routing.positions import num_chunks, sampled_positions
from routing.records import Assignments, Features, Routes, evaluated_positions
from worker.look import look
from worker.numerics import applied
from worker.outcome import Progress, TaskOutcome, blob_of, no_progress
from worker.task_path import path_for_reading

OUTPUTS = {"sample": "features", "assign": "assignments", "route": "routes", "look": "routes"}
# Prefixes between two reports of progress; batches never depend on the machine, but do end here.
_SLICE_SEQUENCES = 1024

# z (N, D) of prefixes of any lengths.
FeaturesOf = Callable[[Sequence[np.ndarray]], np.ndarray]


def run_featurize(
    spec: FeaturizeSpec,
    experiment: Experiment,
    vocab_size: int,
    module_paths: Mapping[str, Path],
    token_path: Path,
    router_path: Path | None,
    out_dir: Path,
    progress: Progress = no_progress,
) -> TaskOutcome:
    """Run the task; its one output is `features`, `assignments` or `routes`, after its mode.

    Raises MalformedMessage where a mode that routes has no router, MalformedRecord, TensorMismatch, BadTokenFile,
    UnsupportedNumerics.
    """
    begin = time.monotonic()
    tally = _Tally(progress)
    with applied(spec.numerics) as compute, TokenFile.open(token_path) as file:
        base = path_for_reading(spec.base, experiment, vocab_size, module_paths, compute)

        def z_of(prefixes: Sequence[np.ndarray]) -> np.ndarray:
            slices = [prefixes[start : start + _SLICE_SEQUENCES] for start in range(0, len(prefixes), _SLICE_SEQUENCES)]
            parts = [np.zeros((0, experiment.model.hidden_size), np.float32)]
            for part in slices:
                with compute.autocast():
                    parts.append(features_of(base, part, compute.device))
                tally.add(part)
            return np.concatenate(parts)

        record: Features | Assignments | Routes
        if spec.mode == "sample":
            record = _sample(spec, file, z_of)
        elif spec.mode == "assign":
            record = _assign(spec, file, _router(router_path), z_of)
        elif spec.mode == "look":
            record = look(spec, experiment, file, base, compute, tally.add)
        else:
            record = _route(spec, experiment.model.sequence_length, file, _router(router_path), z_of)
    name = OUTPUTS[spec.mode]
    out_path = out_dir / name
    out_path.write_bytes(record.to_bytes())
    result = TaskResult(
        outputs={name: blob_of(out_path)},
        tokens=tally.tokens,
        sequences=tally.sequences,
        seconds=time.monotonic() - begin,
    )
    return TaskOutcome({name: out_path}, result)


def _router(path: Path | None) -> FrozenRouter:
    if path is None:
        raise MalformedMessage("a FEATURIZE task that assigns or routes needs a router")
    return read_router(path.read_bytes())


def _first_prefixes(file: TokenFile, positions: np.ndarray, prefix_tokens: int) -> list[np.ndarray]:
    return [first_prefix(file.tokens(int(position)), prefix_tokens) for position in positions]


def _sample(spec: FeaturizeSpec, file: TokenFile, z_of: FeaturesOf) -> Features:
    positions = sampled_positions(file.ids, spec.seed, spec.sample_share)
    return Features(file.ids[positions], z_of(_first_prefixes(file, positions, spec.prefix_tokens)))


def _assign(spec: FeaturizeSpec, file: TokenFile, router: FrozenRouter, z_of: FeaturesOf) -> Assignments:
    z = z_of(_first_prefixes(file, np.arange(file.count), spec.prefix_tokens))
    shards, distances = router.nearest(z, min(spec.top_n, router.num_shards))
    return Assignments(file.ids, shards.astype(np.uint32), distances.astype(np.float32))


def _route(
    spec: FeaturizeSpec, sequence_length: int, file: TokenFile, router: FrozenRouter, z_of: FeaturesOf
) -> Routes:
    """Paths of sequences and of chunks; a chunk that a sequence does not reach has the path of its first."""
    positions = evaluated_positions(file, spec.max_sequences)
    z = z_of(_first_prefixes(file, positions, spec.prefix_tokens))
    first, posterior = router.paths(z).astype(np.uint16), router.posterior(z).astype(np.float32)
    every = {}
    for interval in spec.intervals:
        paths = np.repeat(first[:, None], num_chunks(sequence_length, spec.prefix_tokens, interval), axis=1)  # (N, C)
        for chunk in range(1, paths.shape[1]):
            start = spec.prefix_tokens + 1 + chunk * interval  # index of the chunk's first target
            reached = np.flatnonzero(file.lengths[positions] > start)
            sequences = [file.tokens(int(position)) for position in positions[reached]]
            windows = [prefix_before(tokens, start, spec.prefix_tokens) for tokens in sequences]
            paths[reached, chunk] = router.paths(z_of(windows))
        every[interval] = paths
    return Routes(positions.astype(np.uint32), first, posterior, every)


class _Tally:
    """Counts what has been run, and reports it."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.sequences, self.tokens = 0, 0

    def add(self, prefixes: Sequence[np.ndarray]) -> None:
        self.sequences += len(prefixes)
        self.tokens += sum(len(prefix) for prefix in prefixes)
        self._progress(self.sequences, float("nan"), self.tokens)
