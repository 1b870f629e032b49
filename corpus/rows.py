"""Rows: sequences of a shard packed into rows of equal length, and the order in which training meets them.

Packing is a pure function of the lengths: best-fit decreasing (Johnson 1974; for documents Ding et al., 2404.10830);
no sequence is ever cut. The order is a pure function of (rows, seed, epoch). Positions restart with every sequence, and
`sequence_index` lets attention do the same.

Legend: N sequences, R rows, B rows of a batch, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int32, Int64, UInt32

from corpus.token_file import TokenFile

IGNORED = -100
"""The target of a token that has none: padding and the last token of a sequence."""


class NoRows(ValueError):
    """A shard without rows, or a sequence that no row can hold."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of tokens. `sequence_index` counts the sequences of a row from 0; padding is -1 there, 0 elsewhere."""

    tokens: Int64[np.ndarray, "B T"]
    positions: Int64[np.ndarray, "B T"]
    sequence_index: Int32[np.ndarray, "B T"]

    def targets(self, prefix_tokens: int = 0) -> Int64[np.ndarray, "B T"]:
        """The next token of the same sequence, IGNORED where there is none or where it is one of the first
        `prefix_tokens` after BOS."""
        targets = np.full_like(self.tokens, IGNORED)
        follows = (self.sequence_index[:, 1:] == self.sequence_index[:, :-1]) & (self.sequence_index[:, 1:] >= 0)
        follows &= self.positions[:, 1:] > prefix_tokens
        targets[:, :-1][follows] = self.tokens[:, 1:][follows]
        return targets


@dataclass(frozen=True, slots=True)
class Rows:
    """R rows: row r holds the sequences `members[starts[r]:starts[r + 1]]`, indices in id order, in that order."""

    row_tokens: int
    starts: Int64[np.ndarray, " bounds"]
    members: Int64[np.ndarray, " N"]

    @property
    def count(self) -> int:
        return len(self.starts) - 1

    def sequences(self, row: int) -> Int64[np.ndarray, " n"]:
        """The sequences of one row."""
        return self.members[self.starts[row] : self.starts[row + 1]]

    def batch_rows(self, order_seed: int, step: int, batch_rows: int) -> Int64[np.ndarray, " B"]:
        """The rows of the shard's step `step`: a slice of the endless sequence of permutations, one an epoch."""
        if not self.count:
            raise NoRows("the shard has no rows to train on")
        places = np.arange(step * batch_rows, (step + 1) * batch_rows)
        epochs = places // self.count
        rows = np.empty(batch_rows, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = _permutation(self.count, order_seed, int(epoch))[places[here] % self.count]
        return rows


@lru_cache(maxsize=4)
def _permutation(count: int, order_seed: int, epoch: int) -> Int64[np.ndarray, " R"]:
    """Order of an epoch: sorted by the raw words of Philox, whose stream numpy keeps the same in every version."""
    philox = np.random.Philox(key=np.array([order_seed % 2**64, epoch], np.uint64))
    permutation: np.ndarray = np.argsort(philox.random_raw(count), kind="stable")
    permutation.setflags(write=False)
    return permutation


def pack_rows(lengths: UInt32[np.ndarray, " N"], row_tokens: int) -> Rows:
    """Pack sequences of these lengths, in id order, into rows of at most `row_tokens`; raises NoRows for a longer one.

    Long sequences first, each into the row with the least room that still takes it; then rows by their first sequence.
    """
    if lengths.size and int(lengths.max()) > row_tokens:
        raise NoRows(f"a sequence of {int(lengths.max())} tokens does not fit into a row of {row_tokens}")
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(row_tokens + 1)]
    rooms = 0  # bit r is set where with_room[r] is not empty
    for sequence, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
            rows[row].append(sequence)
        else:
            room, row = row_tokens, len(rows)
            rows.append([sequence])
        if room > length:
            with_room[room - length].append(row)
            rooms |= 1 << (room - length)
    return _in_order(rows, row_tokens)


def _in_order(rows: list[list[int]], row_tokens: int) -> Rows:
    ordered = sorted(sorted(row) for row in rows)
    starts = np.concatenate([[0], np.cumsum([len(row) for row in ordered], dtype=np.int64)]).astype(np.int64)
    members = np.array([sequence for row in ordered for sequence in row], np.int64)
    return Rows(row_tokens, starts, members)


def batch(token_files: Sequence[TokenFile], rows: Rows, row_indices: Int64[np.ndarray, " B"]) -> Batch:
    """The tokens of these rows; `rows` were packed from the lengths of the files laid end to end."""
    shape = (len(row_indices), rows.row_tokens)
    tokens, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    sequence_index = np.full(shape, -1, np.int32)
    ends = np.cumsum([file.count for file in token_files])
    for line, row in enumerate(row_indices):
        start = 0
        for index, sequence in enumerate(rows.sequences(int(row))):
            place = int(np.searchsorted(ends, sequence, side="right"))
            file = token_files[place]
            taken = file.tokens(int(sequence - ends[place] + file.count))
            end = start + len(taken)
            tokens[line, start:end] = taken
            positions[line, start:end] = np.arange(len(taken))
            sequence_index[line, start:end] = index
            start = end
    return Batch(tokens, positions, sequence_index)
