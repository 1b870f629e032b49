"""A token file: the sequences of a document range or of a shard, memory-mapped; a rebuildable cache of the text.

Layout: magic, u64 index length, msgpack index, zeros to a multiple of 64, tokens (little-endian uint16 or uint32).
Nothing of the file is trusted before its sizes are found to agree.

Legend: N sequences, L tokens of one sequence.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from jaxtyping import UInt, UInt16, UInt32, UInt64

MAGIC = b"DPTOKEN1"
_ALIGNMENT = 64
_PART_TOKENS = 1 << 20


class BadTokenFile(ValueError):
    """Bytes that are not a whole token file, or sequences that a token file does not hold."""


def dtype_for(vocab_size: int) -> str:
    """The narrowest stored type that holds every id of the vocabulary."""
    return "uint16" if vocab_size <= 65_536 else "uint32"


@dataclass(frozen=True, slots=True)
class SequenceIndex:
    """What is known of N sequences besides their tokens. Ids ascend; `domains` are indices into `domain_names`."""

    ids: UInt64[np.ndarray, " N"]
    lengths: UInt32[np.ndarray, " N"]
    domains: UInt16[np.ndarray, " N"]
    documents: UInt64[np.ndarray, " N"]
    domain_names: tuple[str, ...]

    def to_bytes(self, dtype: str) -> bytes:
        """The msgpack index of a file whose tokens have this dtype."""
        packed: bytes = msgpack.packb(
            {
                "dtype": dtype,
                "count": len(self.ids),
                "ids": self.ids.astype("<u8").tobytes(),
                "lengths": self.lengths.astype("<u4").tobytes(),
                "domain_names": list(self.domain_names),
                "domains": self.domains.astype("<u2").tobytes(),
                "documents": self.documents.astype("<u8").tobytes(),
            }
        )
        return packed


def write_token_file(path: Path, index: SequenceIndex, dtype: str, tokens: Iterable[UInt[np.ndarray, " L"]]) -> None:
    """Write the sequences in the order of the index; the tokens are consumed one array at a time."""
    header = index.to_bytes(dtype)
    written, expected = 0, int(index.lengths.sum(dtype=np.uint64))
    with open(path, "wb") as file:
        file.write(MAGIC + len(header).to_bytes(8, "little") + header)
        file.write(bytes(-file.tell() % _ALIGNMENT))
        for array in tokens:
            file.write(array.astype(f"<{np.dtype(dtype).str[1:]}", copy=False).tobytes())
            written += array.size
        file.flush()
        os.fsync(file.fileno())
    if written != expected:
        raise BadTokenFile(f"{path}: {written} tokens were given for sequences of {expected}")


class TokenFile:
    """The sequences of one file, memory-mapped read-only; `tokens(i)` is a view that costs nothing to take."""

    def __init__(self, path: Path, index: SequenceIndex, dtype: np.dtype[Any], offset: int) -> None:
        self.path = path
        self.dtype = "uint16" if dtype.itemsize == 2 else "uint32"
        self.ids, self.lengths = index.ids, index.lengths
        self.domains, self.documents, self.domain_names = index.domains, index.documents, index.domain_names
        self._starts = np.concatenate([[0], np.cumsum(index.lengths, dtype=np.int64)])
        total = int(self._starts[-1])
        self._tokens: np.ndarray | None = np.memmap(path, dtype, "r", offset, (total,)) if total else np.zeros(0, dtype)

    @classmethod
    def open(cls, path: Path) -> TokenFile:
        """Map the file; raises BadTokenFile when its parts do not agree."""
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(16)
            length = int.from_bytes(start[8:], "little")
            if start[:8] != MAGIC or 16 + length > size:
                raise BadTokenFile(f"{path} is not a token file, or is cut off")
            index, dtype = _read_index(path, file.read(length))
        offset = 16 + length + -(16 + length) % _ALIGNMENT
        expected = offset + int(index.lengths.sum(dtype=np.uint64)) * dtype.itemsize
        if size != expected:
            raise BadTokenFile(f"{path} has {size} bytes, but its index describes {expected}")
        return cls(path, index, dtype, offset)

    @property
    def count(self) -> int:
        return len(self.ids)

    @property
    def num_tokens(self) -> int:
        return int(self._starts[-1])

    def tokens(self, position: int) -> UInt[np.ndarray, " L"]:
        """The tokens of the sequence at `position` in the file, BOS first."""
        if self._tokens is None:
            raise BadTokenFile(f"{self.path} has been closed")
        return self._tokens[self._starts[position] : self._starts[position + 1]]

    def largest_token(self) -> int:
        """The largest token of the file (0 of none); reads all of it, a part at a time."""
        if self._tokens is None:
            raise BadTokenFile(f"{self.path} has been closed")
        parts = (self._tokens[start : start + _PART_TOKENS] for start in range(0, self.num_tokens, _PART_TOKENS))
        return max((int(part.max()) for part in parts), default=0)

    def close(self) -> None:
        """Let go of the mapping; views taken before stay valid."""
        self._tokens = None

    def __enter__(self) -> TokenFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read_index(path: Path, packed: bytes) -> tuple[SequenceIndex, np.dtype[Any]]:
    try:
        fields = msgpack.unpackb(packed)
        index = SequenceIndex(
            ids=np.frombuffer(fields["ids"], "<u8"),
            lengths=np.frombuffer(fields["lengths"], "<u4"),
            domains=np.frombuffer(fields["domains"], "<u2"),
            documents=np.frombuffer(fields["documents"], "<u8"),
            domain_names=tuple(str(name) for name in fields["domain_names"]),
        )
        dtype = np.dtype({"uint16": "<u2", "uint32": "<u4"}[fields["dtype"]])
        count = int(fields["count"])
    except (ValueError, TypeError, KeyError, OverflowError, msgpack.UnpackException) as error:
        raise BadTokenFile(f"{path} has a broken index: {error}") from None
    if any(len(part) != count for part in (index.ids, index.lengths, index.domains, index.documents)):
        raise BadTokenFile(f"{path} has an index whose parts do not all have {count} sequences")
    if count and int(index.domains.max()) >= len(index.domain_names):
        raise BadTokenFile(f"{path} has a sequence of domain {index.domains.max()} of {len(index.domain_names)}")
    return index, dtype


def gather_sequences(files: Sequence[Path], ids: UInt64[np.ndarray, " N"], out_path: Path) -> None:
    """Write the sequences with these ids, ascending, found in token files whose ids do not interleave."""
    opened = sorted((TokenFile.open(path) for path in files), key=lambda file: int(file.ids[0]) if file.count else -1)
    known = np.concatenate([np.zeros(0, np.uint64), *(file.ids for file in opened)])
    if np.any(known[1:] <= known[:-1]):
        raise BadTokenFile("the token files hold sequences whose ids interleave or repeat")
    ids = np.unique(np.asarray(ids, np.uint64))
    positions = np.searchsorted(known, ids)
    found = positions < known.size
    found[found] = known[positions[found]] == ids[found]
    if not found.all():
        raise BadTokenFile(f"sequence {int(ids[~found][0])} is in none of the {len(opened)} token files")
    _write_selection(opened, positions, out_path)


def _write_selection(files: Sequence[TokenFile], positions: np.ndarray, out_path: Path) -> None:
    """Copy the sequences at these positions of the files laid end to end."""
    names = tuple(sorted({name for file in files for name in file.domain_names}))
    ends = np.cumsum([file.count for file in files])
    chosen = [
        (file, positions[(positions >= end - file.count) & (positions < end)] - (end - file.count))
        for file, end in zip(files, ends, strict=True)
    ]

    def joined(field: str, dtype: type) -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype), *(getattr(file, field)[local] for file, local in chosen)])

    renamed = [
        np.array([names.index(name) for name in file.domain_names], np.uint16)[file.domains[local]]
        for file, local in chosen
        if local.size
    ]
    index = SequenceIndex(
        ids=joined("ids", np.uint64),
        lengths=joined("lengths", np.uint32),
        domains=np.concatenate([np.zeros(0, np.uint16), *renamed]),
        documents=joined("documents", np.uint64),
        domain_names=names,
    )
    dtype = "uint32" if any(file.dtype == "uint32" for file in files) else "uint16"
    write_token_file(out_path, index, dtype, (file.tokens(int(i)) for file, local in chosen for i in local))
