from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpus.rows import IGNORED, NoRows, batch, pack_rows
from corpus.token_file import SequenceIndex, TokenFile, write_token_file


def _file(path: Path, sequences: list[list[int]], first_id: int = 0) -> TokenFile:
    count = len(sequences)
    index = SequenceIndex(
        ids=np.arange(first_id, first_id + count, dtype=np.uint64),
        lengths=np.array([len(tokens) for tokens in sequences], np.uint32),
        domains=np.zeros(count, np.uint16),
        documents=np.zeros(count, np.uint64),
        domain_names=("a",),
    )
    write_token_file(path, index, "uint16", (np.array(tokens, np.uint16) for tokens in sequences))
    return TokenFile.open(path)


@given(st.lists(st.integers(1, 16), max_size=60))
def test_every_sequence_stands_in_exactly_one_row_that_holds_it(lengths: list[int]) -> None:
    rows = pack_rows(np.array(lengths, np.uint32), 16)
    assert sorted(rows.members.tolist()) == list(range(len(lengths)))
    used = [sum(lengths[i] for i in rows.sequences(row)) for row in range(rows.count)]
    assert all(0 < tokens <= 16 for tokens in used)
    # a row is opened only when no other has room, so two half-empty rows cannot be
    assert sum(2 * tokens <= 16 for tokens in used) <= 1


def test_rows_stand_in_the_order_of_their_first_sequence() -> None:
    rows = pack_rows(np.array([3, 8, 5, 8, 2], np.uint32), 8)
    assert [rows.sequences(row).tolist() for row in range(rows.count)] == [[0, 2], [1], [3], [4]]


def test_a_sequence_longer_than_a_row_is_refused() -> None:
    with pytest.raises(NoRows, match="9 tokens does not fit into a row of 8"):
        pack_rows(np.array([9], np.uint32), 8)


def test_an_epoch_meets_every_row_once_and_wraps_into_the_next() -> None:
    rows = pack_rows(np.full(10, 4, np.uint32), 4)
    met = np.concatenate([rows.batch_rows(order_seed=3, step=step, batch_rows=4) for step in range(5)])
    first, second = met[:10], met[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first.tolist() != second.tolist()


def test_the_order_is_a_function_of_the_seed_alone() -> None:
    rows = pack_rows(np.full(50, 4, np.uint32), 4)
    first = rows.batch_rows(7, 2, 8)
    rows.batch_rows(8, 9, 8)
    assert first.tolist() == rows.batch_rows(7, 2, 8).tolist()
    assert first.tolist() != rows.batch_rows(8, 2, 8).tolist()
    golden = pack_rows(np.full(8, 4, np.uint32), 4).batch_rows(order_seed=1, step=0, batch_rows=8)
    assert golden.tolist() == [3, 5, 2, 7, 0, 6, 1, 4]


def test_no_rows_is_an_error_and_not_an_endless_loop() -> None:
    with pytest.raises(NoRows, match="no rows"):
        pack_rows(np.zeros(0, np.uint32), 4).batch_rows(0, 0, 1)


def test_a_batch_restarts_positions_and_targets_with_every_sequence(tmp_path: Path) -> None:
    one = _file(tmp_path / "one", [[0, 5, 6], [0, 7]])
    two = _file(tmp_path / "two", [[0, 8, 9, 1]], first_id=2)
    rows = pack_rows(np.concatenate([one.lengths, two.lengths]), 6)
    assert [rows.sequences(row).tolist() for row in range(rows.count)] == [[0], [1, 2]]
    made = batch([one, two], rows, np.array([1, 0]))
    assert made.tokens.tolist() == [[0, 7, 0, 8, 9, 1], [0, 5, 6, 0, 0, 0]]
    assert made.positions.tolist() == [[0, 1, 0, 1, 2, 3], [0, 1, 2, 0, 0, 0]]
    assert made.sequence_index.tolist() == [[0, 0, 1, 1, 1, 1], [0, 0, 0, -1, -1, -1]]
    ignored = IGNORED
    assert made.targets().tolist() == [[7, ignored, 8, 9, 1, ignored], [5, 6, ignored, ignored, ignored, ignored]]
    assert made.targets(prefix_tokens=2).tolist() == [[ignored] * 4 + [1, ignored], [ignored] * 6]
