from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpus.token_file import BadTokenFile, SequenceIndex, TokenFile, dtype_for, gather_sequences, write_token_file


def _write(path: Path, sequences: dict[int, list[int]], domains: list[str], dtype: str = "uint16") -> None:
    index = SequenceIndex(
        ids=np.array(list(sequences), np.uint64),
        lengths=np.array([len(tokens) for tokens in sequences.values()], np.uint32),
        domains=np.array([number % len(domains) for number in range(len(sequences))], np.uint16),
        documents=np.array([sequence + 1000 for sequence in sequences], np.uint64),
        domain_names=tuple(domains),
    )
    write_token_file(path, index, dtype, (np.array(tokens, dtype) for tokens in sequences.values()))


@given(st.lists(st.lists(st.integers(0, 65_535), max_size=9), max_size=9), st.sampled_from(["uint16", "uint32"]))
def test_a_file_gives_back_its_sequences(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[int]], dtype: str
) -> None:
    path = tmp_path_factory.mktemp("tokens") / "file"
    _write(path, dict(enumerate(rows)), ["a", "b"], dtype)
    with TokenFile.open(path) as file:
        assert (file.count, file.num_tokens, file.dtype) == (len(rows), sum(map(len, rows)), dtype)
        assert [file.tokens(i).tolist() for i in range(file.count)] == rows
        assert file.documents.tolist() == [i + 1000 for i in range(len(rows))]
        assert [file.domain_names[d] for d in file.domains] == ["ab"[i % 2] for i in range(len(rows))]


def test_tokens_are_aligned_little_endian_and_mapped(tmp_path: Path) -> None:
    _write(tmp_path / "file", {0: [1, 2, 258]}, ["a"])
    data = (tmp_path / "file").read_bytes()
    assert data[:8] == b"DPTOKEN1"
    assert (len(data) - 6) % 64 == 0
    assert data[-6:] == bytes([1, 0, 2, 0, 2, 1])
    file = TokenFile.open(tmp_path / "file")
    view = file.tokens(0)
    assert isinstance(view, np.memmap)
    assert not view.flags.writeable
    file.close()
    assert view.tolist() == [1, 2, 258]
    with pytest.raises(BadTokenFile, match="closed"):
        file.tokens(0)


def test_the_narrowest_type_that_fits() -> None:
    assert (dtype_for(65_536), dtype_for(65_537)) == ("uint16", "uint32")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    _write(path, {0: [1, 2, 3], 1: [4]}, ["a"])
    whole = path.read_bytes()
    for damaged in (
        b"",
        whole[:10],
        whole[:40],
        whole[:-1],
        whole + b"\0",
        b"X" + whole[1:],
        whole[:16] + b"\xc1" + whole[17:],
    ):
        path.write_bytes(damaged)
        with pytest.raises(BadTokenFile, match="file"):
            TokenFile.open(path)


def test_lengths_that_disagree_with_the_tokens_are_refused(tmp_path: Path) -> None:
    empty = np.zeros(1, np.uint64)
    index = SequenceIndex(empty, np.array([3], np.uint32), empty.astype(np.uint16), empty, ("a",))
    with pytest.raises(BadTokenFile, match="2 tokens were given for sequences of 3"):
        write_token_file(tmp_path / "file", index, "uint16", [np.array([1, 2], np.uint16)])


def test_gathering_takes_sequences_from_several_files_in_id_order(tmp_path: Path) -> None:
    later, earlier = 1 << 32, 0
    _write(tmp_path / "later", {later + i: [i, i] for i in range(4)}, ["x", "b"])
    _write(tmp_path / "earlier", {earlier + i: [10 + i] for i in range(4)}, ["b", "a"])
    _write(tmp_path / "empty", {}, ["z"])
    ids = np.array([later + 2, 3, 1, later], np.uint64)
    gather_sequences([tmp_path / "later", tmp_path / "empty", tmp_path / "earlier"], ids, tmp_path / "shard")
    with TokenFile.open(tmp_path / "shard") as shard:
        assert shard.ids.tolist() == [1, 3, later, later + 2]
        assert [shard.tokens(i).tolist() for i in range(4)] == [[11], [13], [0, 0], [2, 2]]
        assert [shard.domain_names[d] for d in shard.domains] == ["a", "a", "x", "x"]
        assert shard.documents.tolist() == [1001, 1003, later + 1000, later + 1002]


def test_gathering_does_not_depend_on_the_order_of_files_or_ids(tmp_path: Path) -> None:
    _write(tmp_path / "one", {i: [i] for i in range(5)}, ["a", "b"])
    _write(tmp_path / "two", {i: [i] for i in range(5, 9)}, ["c"], "uint32")
    ids = np.array([7, 0, 3], np.uint64)
    gather_sequences([tmp_path / "one", tmp_path / "two"], ids, tmp_path / "left")
    gather_sequences([tmp_path / "two", tmp_path / "one"], ids[::-1], tmp_path / "right")
    assert (tmp_path / "left").read_bytes() == (tmp_path / "right").read_bytes()


def test_gathering_refuses_unknown_and_repeated_ids(tmp_path: Path) -> None:
    _write(tmp_path / "one", {0: [1], 2: [1]}, ["a"])
    _write(tmp_path / "two", {1: [1], 3: [1]}, ["a"])
    with pytest.raises(BadTokenFile, match="sequence 9 is in none of the 1 token files"):
        gather_sequences([tmp_path / "one"], np.array([0, 9], np.uint64), tmp_path / "out")
    with pytest.raises(BadTokenFile, match="interleave or repeat"):
        gather_sequences([tmp_path / "one", tmp_path / "two"], np.array([0], np.uint64), tmp_path / "out")
