"""Which blobs the rows of a run name: none of them may be deleted, and each must be there for the run to go on. Pure.

Rows are walked field by field, whatever their type, so that a new kind of row or field is protected from its first day.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

from pydantic import BaseModel

from coordinator.state import Best, Module, Row, Shard, Stage, State, Task
from protocol.tasks import BlobRef

_HEX = frozenset("0123456789abcdef")


class Reference(NamedTuple):
    """What a blob is to the run, in words, its size in bytes, and whether the run cannot go on without it."""

    size: int
    what: str
    needed: bool = True


def rows_of(state: State) -> Iterator[Row]:
    """All rows of all tables."""
    for table in vars(state).values():
        for row in table.values() if isinstance(table, dict) else [table]:
            if hasattr(row, "table"):
                yield row


def referenced_digests(state: State) -> set[str]:
    """Every digest that stands in a row, also where its size does not stand beside it."""
    return digests_in(rows_of(state))


def referenced_blobs(state: State) -> dict[str, Reference]:
    """Every blob that a row names with its size.

    Not needed to go on are older versions of a module, and the partial progress of a task: it only saves inner steps.
    """
    found: dict[str, Reference] = {}
    for row in rows_of(state):
        spare = {ref.digest: what for ref, what in _spare(row)}
        for ref in blobs_in(row):
            reference = Reference(ref.size, spare.get(ref.digest, _words(row)), needed=ref.digest not in spare)
            if ref.digest not in found or reference.needed:
                found[ref.digest] = reference
    return found


def digests_in(value: Any) -> set[str]:
    """All digests inside a value, at any depth: a row, rows, or what a row holds."""
    return {text for text in _leaves(value) if isinstance(text, str) and _is_digest(text)}


def _is_digest(text: object) -> bool:
    return isinstance(text, str) and len(text) == 64 and _HEX.issuperset(text)


def _parts(value: Any) -> Iterable[Any] | None:
    """What a value consists of; None where it is a plain one."""
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, BaseModel):
        return vars(value).values()
    if is_dataclass(value):
        return [getattr(value, each.name) for each in fields(value)]
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        return None
    return value


def _leaves(value: Any) -> Iterator[Any]:
    parts = _parts(value)
    if parts is None:
        yield value
        return
    for part in parts:
        yield from _leaves(part)


def blobs_in(value: Any) -> Iterator[BlobRef]:
    """References with a size inside a value, at any depth: as such, as a plain dict, or as [digest, size]."""
    if isinstance(value, BlobRef):
        yield value
        return
    if isinstance(value, dict) and value.keys() == {"digest", "size"}:
        yield BlobRef(digest=value["digest"], size=value["size"])
        return
    if isinstance(value, list | tuple) and len(value) == 2 and _is_digest(value[0]) and isinstance(value[1], int):
        yield BlobRef(digest=value[0], size=value[1])
        return
    for part in _parts(value) or ():
        yield from blobs_in(part)


def _spare(row: Row) -> Iterator[tuple[BlobRef, str]]:
    """The blobs of a row that the run can do without, and what they are to it."""
    if isinstance(row, Module):
        yield from ((ref, f"an older version of {_words(row)}") for ref in row.history)
    if isinstance(row, Task) and row.checkpoint is not None:
        yield row.checkpoint.blob, f"the partial progress of {_words(row)}"


def _words(row: Row) -> str:
    match row:
        case Module():
            return f"module {row.key} (version {row.version})"
        case Shard():
            return f"shard {row.key}"
        case Best():
            return f"the best version of path {row.path_index}"
        case Task():
            return f"task {row.task_id}"
        case Stage():
            return f"the result of stage {row.name}"
    return f"{row.table} {row.key}"


class Referenced:
    """The digests of all rows, looked for again only in rows that have changed: rows are immutable."""

    def __init__(self) -> None:
        self._of_row: dict[tuple[str, str], tuple[Row, frozenset[str]]] = {}

    def digests(self, state: State) -> set[str]:
        current: dict[tuple[str, str], tuple[Row, frozenset[str]]] = {}
        for row in rows_of(state):
            known = self._of_row.get((row.table, row.key))
            current[row.table, row.key] = known if known and known[0] is row else (row, frozenset(digests_in(row)))
        self._of_row = current
        return set().union(*(digests for _, digests in current.values()))
