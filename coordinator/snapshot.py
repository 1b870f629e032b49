"""A run directory opened for reading: what evaluation, generation, digests and status need of it.

Reads rows in one pass over the journal, so that it sees a state between two decisions, also of a run that goes on.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from configs.schema import Config
from coordinator.journal import Journal, RunUnusable
from coordinator.machine import Machine
from coordinator.pins import NO_LINKS, Pins, pinning
from coordinator.plan import BASE, MIXTURE, Plan, blob
from coordinator.references import Reference, referenced_blobs
from coordinator.state import State, Version
from coordinator.status import Tally, status_of
from model.store import BlobStore
from model.topology import Topology
from protocol.tasks import PathRef

MAX_ATTEMPTS = 1000


class RunSnapshot:
    """The rows, metrics and blobs of a run as they are now."""

    def __init__(self, run_dir: Path, config: Config, state: State, metrics: list[dict[str, Any]]) -> None:
        self.run_dir = run_dir
        self.config = config
        self.plan = Plan(config)
        self.state = state
        self.metrics = metrics
        self.store = BlobStore(run_dir / "blobs")

    @classmethod
    def open(cls, run_dir: Path) -> RunSnapshot:
        """Read a run directory; raises RunUnusable where it is none."""
        if not run_dir.is_dir():
            raise RunUnusable(f"there is no run directory {run_dir}; `dipaco run CONFIG --run-dir {run_dir}` makes one")
        journal = Journal(run_dir, read_only=True)
        try:
            document = journal.meta("config")
            if document is None:
                raise RunUnusable(f"{run_dir} holds a run that has not begun yet; start its coordinator first")
            config = Config.model_validate(json.loads(document))
            return cls(run_dir, config, State(journal.rows()), list(journal.metrics()))
        finally:
            journal.close()

    @classmethod
    @contextmanager
    def held(cls, run_dir: Path) -> Iterator[RunSnapshot]:
        """The newest state with its blobs, which stay until this is left, whatever the run lets go of meanwhile.

        Where nothing can be held (another owner, a read-only copy) it is what `open` gives. Raises RunUnusable.
        """
        with ExitStack() as stack:
            snapshot = cls.open(run_dir)
            try:
                pins = stack.enter_context(pinning(run_dir))
                snapshot = cls.open_with(run_dir, pins)
                snapshot.store = BlobStore(pins.root, known_as=run_dir / "blobs")
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
            yield snapshot

    @classmethod
    def open_with(cls, run_dir: Path, pins: Pins) -> RunSnapshot:
        """A state all of whose blobs are held by `pins`: the newest, read again where a blob went before it was held.

        What two states in a row name and lack was not let go of by the run: who needs it will be told.
        """
        lacked: set[str] = set()
        for _ in range(MAX_ATTEMPTS):
            snapshot = cls.open(run_dir)
            missing = pins.hold(snapshot.blobs())
            if missing <= lacked:
                return snapshot
            lacked = missing
        raise RunUnusable(f"{run_dir} changes faster than it can be read; try again when it is less busy")

    def blobs(self) -> dict[str, Reference]:
        """The blobs of this state, without those that only tasks of the past name."""
        live = self.state.copy()
        live.forget_tasks(Machine(self.plan, live, random.Random(0)).consumed())
        return referenced_blobs(live)

    @property
    def topology(self) -> Topology:
        return self.plan.mixture

    @property
    def corpus(self) -> dict[str, Any]:
        """The result of the corpus stage; raises RunUnusable before it is done."""
        result = self.state.stages["corpus"].result
        if not result:
            raise RunUnusable(f"the corpus of {self.run_dir} is not built yet; let the run go on first")
        return result

    @property
    def vocab_size(self) -> int:
        return int(self.corpus["vocab_size"])

    @property
    def tokenizer_path(self) -> Path:
        return self.store.path(blob(self.corpus["tokenizer"]).digest)

    @property
    def router_path(self) -> Path | None:
        """The frozen router, where the run has one."""
        router = self.plan.router(self.state)
        return None if router is None else self.store.path(router.digest)

    def modules(self, model: str = MIXTURE) -> dict[str, tuple[int, Path]]:
        """The newest version of every module of a model, id to (version, file); raises RunUnusable without any."""
        rows = self.state.modules_of(model)
        if not rows:
            raise RunUnusable(f"{self.run_dir} holds no modules of {model!r} yet; let the run go on first")
        return {row.module_id: (row.version, self.store.path(row.params.digest)) for row in rows}

    def paths(self, model: str = MIXTURE, version: Version = "last") -> list[PathRef]:
        """Every path of a model; raises RunUnusable where the run has no modules of it, or keeps no best versions."""
        self.modules(model)
        if version == "best" and self.config.experiment.early_stopping is None:
            raise RunUnusable(f"{self.run_dir} keeps no best versions: its experiment.early_stopping is not set")
        paths = range(self.plan.topology(model).num_paths)
        return [self.plan.path_ref(self.state, model, path_index, version) for path_index in paths]

    def base_modules(self) -> dict[str, tuple[int, Path]]:
        """The modules of the base LM whose features the router reads."""
        return self.modules(BASE)

    def models(self) -> list[str]:
        """The models of the run, in the order in which they appeared."""
        return list(dict.fromkeys(row.model for row in self.state.modules.values()))

    def token_files(self, split: str) -> list[Path]:
        """The token files of one split, by range index."""
        return [self.store.path(blob(part["file"]).digest) for part in self.plan.ranges(self.state, split)]

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """What the evaluate stage measured, once it is done."""
        stage = self.state.stages.get("evaluate")
        return stage.result if stage is not None and stage.status == "done" else None

    def status(self) -> dict[str, Any]:
        """The status as the coordinator would tell it, without workers."""
        tally = Tally()
        for metric in self.metrics:
            tally.add(metric)
        return status_of(self.plan, self.state, tally, 0.0)
