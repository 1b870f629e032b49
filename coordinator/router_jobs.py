"""The coordinator's own task of `targets`: from the losses of every path to the path that is best at every token.

Losses are read a path at a time: memory is bounded by the records of one token file under one path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from coordinator.plan import Plan, blob
from coordinator.state import State, Task
from corpus.token_file import SequenceIndex, TokenFile, gather_sequences, write_token_file
from model.store import BlobStore
from routing.records import Losses, MalformedRecord, ShardManifest
from routing.sharding import UnusableShards
from routing.targets import NO_TARGET, best_next_paths, targets_of


class RouterJobs:
    """Runs it for one run."""

    def __init__(self, plan: Plan, store: BlobStore, say: Callable[[str], None]) -> None:
        self._plan, self._store, self._say = plan, store, say

    def label(self, task: Task, state: State) -> dict[str, Any]:
        """The targets as a token file of paths, sequences by id, and the manifest of its sequences."""
        scored = {each.subject: each.outputs["losses"] for each in state.tasks_of(task.stage) if each.kind == "SCORE"}
        folder = self._store.scratch()
        parts: list[Path] = []
        for part in self._plan.ranges(state, "router"):
            if part["sequences"]:
                keys = [f"{path_index}-{part['index']}" for path_index in range(self._plan.mixture.num_paths)]
                parts.append(folder / str(part["index"]))
                records = [self._store.path(scored[key].digest) for key in keys]
                self._write_targets(self._store.path(blob(part["file"]).digest), records, parts[-1])
        ids = np.concatenate([np.zeros(0, np.uint64), *(_ids_of(part) for part in parts)])
        if not len(ids):
            raise UnusableShards(
                "the router split has no sequence that is long enough to be scored; raise corpus.splits.router"
            )
        gather_sequences(parts, ids, folder / "targets")
        for written in parts:
            written.unlink()
        shares, count = self._shares(folder / "targets")
        shown = ", ".join(f"{100 * share:.1f}" for share in shares[:16])
        self._say(f"{task.stage}: {count:,} tokens of {len(ids):,} sequences have a best next path; by path {shown} %")
        return {
            "targets": list(self._store.put_file(folder / "targets")),
            "manifest": list(self._store.put_bytes(ShardManifest(0, "", ids).to_bytes())),
            "sequences": len(ids),
            "labelled_tokens": count,
            "target_shares": shares,
        }

    def _write_targets(self, tokens: Path, records: Sequence[Path], out_path: Path) -> None:
        """The targets of the scored sequences of one token file, from one record of losses a path."""
        router = self._plan.experiment.router
        assert router is not None, "a stage of another run"
        first = Losses.from_bytes(records[0].read_bytes())
        best = best_next_paths(_tables(records, first.positions), router.window)
        prefix_tokens = self._plan.experiment.sharding.prefix_tokens
        with TokenFile.open(tokens) as file:
            chosen = first.positions
            index = SequenceIndex(
                ids=file.ids[chosen],
                lengths=file.lengths[chosen],
                domains=file.domains[chosen],
                documents=file.documents[chosen],
                domain_names=tuple(file.domain_names),
            )
        targets = (targets_of(row, int(length), prefix_tokens) for row, length in zip(best, index.lengths, strict=True))
        write_token_file(out_path, index, "uint16", targets)

    def _shares(self, targets: Path) -> tuple[list[float], int]:
        """The share of each path in the targets, and how many there are."""
        num_paths = self._plan.mixture.num_paths
        counts = np.zeros(num_paths, np.int64)
        with TokenFile.open(targets) as file:
            for position in range(file.count):
                row = file.tokens(position)
                counts += np.bincount(row[row != NO_TARGET], minlength=num_paths)
        return (counts / max(1, counts.sum())).tolist(), int(counts.sum())


def _tables(records: Sequence[Path], positions: npt.NDArray[Any]) -> Iterator[npt.NDArray[np.float64]]:
    """The losses of each path; raises MalformedRecord where they are not of the same sequences, token by token."""
    for path in records:
        record = Losses.from_bytes(path.read_bytes())
        if not np.array_equal(record.positions, positions) or (record.count > 1).any():
            raise MalformedRecord("two paths were scored on different sequences, or by more than single tokens")
        yield record.loss


def _ids_of(path: Path) -> npt.NDArray[np.uint64]:
    with TokenFile.open(path) as file:
        return np.array(file.ids)
