"""What a coordinator finds when it opens a run that goes on: whether its blobs are there and whole, and what was left.

Existence and size of every blob are looked at always, contents where that is asked for. What nothing refers to goes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from coordinator.journal import RunUnusable
from coordinator.pins import clear_abandoned
from coordinator.references import Reference
from model.store import BlobMismatch, BlobStore, UnknownBlob

REMEDY = (
    "put back the file of that name from a backup or from a worker's cache, or go on from a backup (`dipaco backup` "
    "makes them)"
)
SAY_EVERY = 0.25


@dataclass(frozen=True, slots=True)
class Damage:
    """One blob that is not as its reference says, and why."""

    digest: str
    reference: Reference
    why: str


@dataclass(frozen=True, slots=True)
class Findings:
    """What was found in the store and beside it. The run goes on without what is `damaged`."""

    blobs: int
    blob_bytes: int
    verified: bool
    damaged: tuple[Damage, ...]
    orphans: int
    orphan_bytes: int
    holders_gone: int

    @property
    def lost(self) -> frozenset[str]:
        """Digests that no row should be gone on from."""
        return frozenset(each.digest for each in self.damaged)

    def sentence(self, uploads: int, torn_event: bool) -> str:
        """All of it on one line, for the log."""
        parts = [
            f"found {self.blobs} blobs of {_size(self.blob_bytes)}, each there in its size"
            + (" and with the bytes of its digest" if self.verified else " (--verify reads their bytes, too)"),
            f"removed {self.orphans} that nothing needs ({_size(self.orphan_bytes)} freed)",
            f"{uploads} uploaded outputs are kept",
        ]
        if self.holders_gone:
            parts.append(f"removed what {self.holders_gone} readers that are gone had held")
        if torn_event:
            parts.append("the last line of the event log was cut short and is left out")
        parts += [f"{each.reference.what} ({each.digest}) {each.why}: not needed to go on" for each in self.damaged]
        return "; ".join(parts)


def recover_store(
    run_dir: Path,
    store: BlobStore,
    references: Mapping[str, Reference],
    kept: set[str],
    say: Callable[[str], None],
    *,
    verify: bool,
) -> Findings:
    """Check what is referred to, then remove all but that and `kept`. Raises RunUnusable, before anything is removed.

    Only for the one owner of the store, before it starts.
    """
    damaged = [*_damaged(store, references, verify, say)]
    needed = [each for each in damaged if each.reference.needed]
    if needed:
        first, more = needed[0], len(needed) - 1
        raise RunUnusable(
            f"blob {store.root / first.digest} ({first.reference.what}) {first.why}"
            + (f", and {more} more are damaged" if more else "")
            + f"; {REMEDY}"
        )
    orphans = [digest for digest in store.digests() if digest not in kept and digest not in references]
    freed = sum(store.size(digest) for digest in orphans)
    for digest in orphans:
        store.delete(digest)
    store.clear_scratch()
    blob_bytes = sum(reference.size for reference in references.values())
    gone = clear_abandoned(run_dir)
    return Findings(len(references) - len(damaged), blob_bytes, verify, tuple(damaged), len(orphans), freed, gone)


def _damaged(
    store: BlobStore, references: Mapping[str, Reference], verify: bool, say: Callable[[str], None]
) -> list[Damage]:
    found = []
    told = SAY_EVERY
    for index, (digest, reference) in enumerate(sorted(references.items())):
        why = what_is_wrong(store, digest, reference.size, verify=verify)
        if why:
            found.append(Damage(digest, reference, why))
        if verify and (index + 1) / len(references) >= told:
            told += SAY_EVERY
            say(f"read and verified {index + 1} of {len(references)} blobs")
    return found


def what_is_wrong(store: BlobStore, digest: str, size: int, *, verify: bool) -> str:
    """Why a blob is not what it should be, or an empty string."""
    try:
        held = store.size(digest)
        if held != size:
            return f"has {held} bytes, not {size}"
        if verify:
            store.verify(digest)
    except UnknownBlob:
        return "is missing"
    except BlobMismatch:
        return "holds other bytes than its digest names"
    return ""


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
