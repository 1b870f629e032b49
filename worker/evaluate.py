"""EVALUATE: losses of the evaluated sequences of a token file under one path, by chunk after the prefix.

Batches are a pure function of the file and the spec, by groups of like length, so that neither the machine nor the
number of workers changes a loss. Chunk c holds the targets prefix + 1 + c * W .. prefix + (c + 1) * W.

Legend: N evaluated sequences, C chunks, B sequences of a batch, T tokens, M counted targets, W chunk_tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float64, Int32, Int64, Integer

from configs.schema import Experiment
from corpus.token_file import TokenFile
from corpus.tokenizer import Tokenizer
from model.transformer import PathModel
from protocol.tasks import EvaluateSpec, TaskResult
from routing.positions import num_chunks
from routing.records import Losses, evaluated_positions
from worker.numerics import Compute, applied
from worker.outcome import Progress, TaskOutcome, blob_of, no_progress
from worker.task_path import path_for_reading

LOSSES = "losses"
# Tokens of a batch, padding included, as so many sequences of full length.
BATCH_SEQUENCES = 8


def run_evaluate(
    spec: EvaluateSpec,
    experiment: Experiment,
    vocab_size: int,
    module_paths: Mapping[str, Path],
    token_path: Path,
    selection_path: Path | None,
    tokenizer_path: Path | None,
    out_dir: Path,
    progress: Progress = no_progress,
) -> TaskOutcome:
    """Run the task; its one output is `losses`, with bytes counted where there is a tokenizer.

    Raises TensorMismatch, BadTokenFile, BadTokenizer, UnsupportedNumerics.
    """
    begin = time.monotonic()
    token_bytes = None if tokenizer_path is None else Tokenizer.from_file(tokenizer_path).token_byte_lengths()
    with applied(spec.numerics) as compute, TokenFile.open(token_path) as file:
        if selection_path is None:
            positions = evaluated_positions(file, spec.max_sequences)
        else:
            positions = np.frombuffer(selection_path.read_bytes(), "<u4")
        path = path_for_reading(spec.path, experiment, vocab_size, module_paths, compute)
        grid = LossGrid(len(positions), experiment.model.sequence_length, spec.prefix_tokens, spec.chunk_tokens)
        batch_tokens = BATCH_SEQUENCES * experiment.model.sequence_length
        for indices in batches(file.lengths[positions], batch_tokens):
            sequences = [file.tokens(int(positions[index])) for index in indices]
            grid.add(indices, sequences, _target_losses(path, compute, sequences, spec.prefix_tokens), token_bytes)
            progress(grid.sequences, grid.mean_loss, grid.tokens)
        record = Losses(
            positions=positions.astype(np.uint32),
            loss=grid.loss,
            count=grid.count,
            text_bytes=grid.bytes,
            domains=file.domains[positions],
            domain_names=tuple(file.domain_names),
        )
    out_path = out_dir / LOSSES
    out_path.write_bytes(record.to_bytes())
    result = TaskResult(
        outputs={LOSSES: blob_of(out_path)},
        tokens=grid.tokens,
        sequences=grid.sequences,
        loss_sum=grid.loss_sum,
        seconds=time.monotonic() - begin,
    )
    return TaskOutcome({LOSSES: out_path}, result)


class LossGrid:
    """Sums of losses (nats), targets and bytes for N sequences and C chunks, each (N, C)."""

    def __init__(self, num_sequences: int, sequence_length: int, prefix_tokens: int, chunk_tokens: int) -> None:
        self._prefix_tokens, self._chunk_tokens = prefix_tokens, chunk_tokens
        shape = (num_sequences, num_chunks(sequence_length, prefix_tokens, chunk_tokens))
        self.loss = np.zeros(shape, np.float64)
        self.count = np.zeros(shape, np.uint32)
        self.bytes = np.zeros(shape, np.uint32)
        self.sequences = 0

    def add(
        self,
        indices: Int64[np.ndarray, " B"],
        sequences: list[np.ndarray],
        losses: Float64[np.ndarray, " M"],
        token_bytes: Int64[np.ndarray, " V"] | None,
    ) -> None:
        """Sort the losses of the sequences' counted targets, laid end to end, into their chunks."""
        end = 0
        for index, tokens in zip(indices, sequences, strict=True):
            targets = tokens[self._prefix_tokens + 1 :]
            begin, end = end, end + len(targets)
            starts = np.arange(0, len(targets), self._chunk_tokens)
            used = len(starts)
            self.loss[index, :used] = np.add.reduceat(losses[begin:end], starts)
            self.count[index, :used] = np.diff(np.append(starts, len(targets)))
            if token_bytes is not None:
                self.bytes[index, :used] = np.add.reduceat(token_bytes[targets], starts)
        self.sequences += len(indices)

    @property
    def tokens(self) -> int:
        return int(self.count.sum(dtype=np.int64))

    @property
    def loss_sum(self) -> float:
        return float(self.loss.sum())

    @property
    def mean_loss(self) -> float:
        """Nats per counted token so far."""
        return self.loss_sum / self.tokens if self.tokens else float("nan")


def batches(lengths: Integer[np.ndarray, " N"], batch_tokens: int) -> Iterator[Int64[np.ndarray, " B"]]:
    """Indices of sequences, shortest first, cut where sequences times the longest would exceed `batch_tokens`."""
    order = np.argsort(lengths, kind="stable")
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and (end + 1 - start) * int(lengths[order[end]]) <= batch_tokens:
            end += 1
        yield order[start:end]
        start = end


def padded(sequences: list[np.ndarray]) -> tuple[Int64[np.ndarray, "B T"], Int32[np.ndarray, "B T"]]:
    """Tokens of a batch, and their sequence index: 0, and -1 behind the end of a sequence."""
    shape = (len(sequences), max(len(tokens) for tokens in sequences))
    tokens, sequence_index = np.zeros(shape, np.int64), np.full(shape, -1, np.int32)
    for line, sequence in enumerate(sequences):
        tokens[line, : len(sequence)] = sequence
        sequence_index[line, : len(sequence)] = 0
    return tokens, sequence_index


@torch.no_grad()
def _target_losses(path: PathModel, compute: Compute, sequences: list[np.ndarray], prefix_tokens: int) -> np.ndarray:
    """float64 losses of the counted targets of the sequences, laid end to end."""
    tokens, sequence_index = padded(sequences)
    counted = np.zeros(tokens.shape, bool)  # tokens whose next token is a counted target
    counted[:, prefix_tokens:-1] = sequence_index[:, prefix_tokens + 1 :] >= 0
    targets = tokens[:, 1:][counted[:, :-1]]
    device = compute.device
    with compute.autocast():
        hidden = path(torch.from_numpy(tokens).to(device), None, torch.from_numpy(sequence_index).to(device))
        losses = path.token_losses(hidden[torch.from_numpy(counted).to(device)], torch.from_numpy(targets).to(device))
    return losses.float().cpu().numpy().astype(np.float64)
