"""A run that may still be training, as a server sees it: the newest snapshot whose every path is complete.

Read-only. The blobs of a snapshot stay, as hard links, until nobody holds its paths any more; where a file system has
no links they are those of the run itself.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from coordinator.journal import RunUnusable
from coordinator.pins import NO_LINKS, Pins, pinning
from coordinator.plan import BASE, MIXTURE, ROUTER, Plan
from coordinator.snapshot import RunSnapshot
from coordinator.state import State, Version
from corpus.tokenizer import Tokenizer
from dipaco.ending import Refused
from dipaco.run_router import open_router, open_router_lm
from inference.module_cache import ModuleCache
from inference.path_source import PathSource
from model.store import BlobStore
from routing.router import FeatureRouter, OnePath, Router

Digests = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Taken:
    """One snapshot: its paths and routers. `router` knows one path only where the run cannot tell paths apart."""

    name: str
    paths: PathSource
    router: Router
    router_lm: Router | None
    has_router: bool


def complete_paths(plan: Plan, state: State, model: str, version: Version = "last") -> list[tuple[str, ...] | None]:
    """The digests of every path's modules at the newest phase that all of them have stepped; None where it was dropped.

    Modules of one path are at most one outer step apart: none goes on before the path has trained on all of them.
    """
    found: list[tuple[str, ...] | None] = []
    for path_index in range(plan.topology(model).num_paths):
        path = plan.path_ref(state, model, path_index, version)
        phase = min(module.version for module in path.modules)
        digests = []
        for module in path.modules:
            kept = (
                module.blob,
                *(state.modules[f"{model}/{module.module_id}"].history if module.version > phase else ()),
            )
            if module.version - phase < len(kept):
                digests.append(kept[module.version - phase].digest)
        found.append(tuple(digests) if len(digests) == len(path.modules) else None)
    return found


class FollowedRun:
    """One run, by its directory; `take` is for one thread at a time."""

    def __init__(self, run_dir: Path, pins: Pins | None, version: Version, memory_bytes: int) -> None:
        self._run_dir, self._pins, self._version = run_dir, pins, version
        self.first = self._open()
        self.tokenizer = Tokenizer.from_file(self.first.tokenizer_path)
        root = run_dir / "blobs"
        self._store = BlobStore(root) if pins is None else BlobStore(pins.root, known_as=root)
        self.model = MIXTURE if MIXTURE in self.first.models() else BASE
        self.topology = self.first.plan.topology(self.model)
        self.cache = ModuleCache(self._store, memory_bytes)
        self._newest: str | None = None
        self._digests: Digests | None = None
        self._stamp: object = None
        self._held: dict[int, set[str]] = {}
        self._let_go: deque[int] = deque()
        self._takes = 0

    def take(self) -> Taken | None:
        """The newest snapshot; None where there is none newer than the one taken before.

        Raises RunUnusable where a path is between two phases and was never taken before, DamagedModule.
        """
        self._unlink_unused()
        stamp = _stamp(self._run_dir)
        if self._newest is not None and (
            stamp == self._stamp or self._name(RunSnapshot.open(self._run_dir)) == self._newest
        ):
            self._stamp = stamp
            return None
        snapshot = self.first if self._newest is None else self._open()
        name, digests = self._name(snapshot), self._complete(snapshot)
        snapshot.store = self._store
        taken = self._taken(snapshot, name, digests)
        self._newest, self._digests, self._stamp = name, digests, stamp  # once it is whole: else it is tried again
        self._hold(taken.paths, {digest for path in digests for digest in path})
        return taken

    def _name(self, snapshot: RunSnapshot) -> str:
        """Changes with anything that could change a text."""
        parts = [*map(" ".join, self._complete(snapshot)), _router_digest(snapshot), *self._router_lm_digests(snapshot)]
        return "snapshot-" + hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]

    def _open(self) -> RunSnapshot:
        return (
            RunSnapshot.open(self._run_dir) if self._pins is None else RunSnapshot.open_with(self._run_dir, self._pins)
        )

    def _complete(self, snapshot: RunSnapshot) -> Digests:
        """Every path at its newest complete phase; one that has none now keeps what was taken before."""
        snapshot.paths(self.model, self._version)
        before = self._digests or (None,) * self.topology.num_paths
        paths = complete_paths(snapshot.plan, snapshot.state, self.model, self._version)
        chosen = tuple(now or then for now, then in zip(paths, before, strict=True))
        missing = [self.topology.path_id(index) for index, path in enumerate(chosen) if path is None]
        if missing:
            raise RunUnusable(
                f"path {missing[0]} of {self._run_dir} is between two phases and execution.keep_versions is 1: it is "
                "complete again in a moment, or set keep_versions to 2"
            )
        return tuple(path for path in chosen if path is not None)

    def _router_lm_digests(self, snapshot: RunSnapshot) -> list[str]:
        """The modules of a trained router LM."""
        stage = snapshot.state.stages.get(ROUTER)
        if stage is None or stage.status != "done" or self.topology.num_paths == 1:
            return []
        return sorted(path.name for _, path in snapshot.modules(ROUTER).values())

    def _taken(self, snapshot: RunSnapshot, name: str, digests: Digests) -> Taken:
        experiment = snapshot.config.experiment
        paths = PathSource(experiment.model, snapshot.vocab_size, self.topology, digests, self.cache)
        router: Router = OnePath()
        routed = bool(_router_digest(snapshot)) and self.topology.num_paths > 1
        if routed:
            opened = open_router(snapshot)
            router = FeatureRouter(opened.base, opened.frozen)
        router_lm = open_router_lm(snapshot) if self._router_lm_digests(snapshot) else None
        return Taken(name, paths, router, router_lm, routed)

    def _hold(self, paths: PathSource, digests: set[str]) -> None:
        """Keep the blobs until the paths are garbage; routers, bases and the tokenizer were read whole."""
        self._takes += 1
        self._held[self._takes] = digests
        weakref.finalize(paths, self._let_go.append, self._takes)
        self._unlink_unused(always=True)

    def _unlink_unused(self, always: bool = False) -> None:
        """Let go of the files of snapshots that are not in use any more."""
        if self._pins is None or not (self._let_go or always):
            return
        while self._let_go:
            del self._held[self._let_go.popleft()]
        wanted = {digest for digests in self._held.values() for digest in digests}
        for digest in list(self._store.digests()):
            if digest not in wanted:
                self._store.delete(digest)


def _router_digest(snapshot: RunSnapshot) -> str:
    """The frozen router; empty where there is none."""
    return "" if snapshot.router_path is None else snapshot.router_path.name


def _stamp(run_dir: Path) -> tuple[tuple[int, int] | None, ...]:
    """Differs when the journal was written to."""
    stamps: list[tuple[int, int] | None] = []
    for name in ("state.db", "state.db-wal"):
        try:
            found = (run_dir / name).stat()
            stamps.append((found.st_mtime_ns, found.st_size))
        except OSError:
            stamps.append(None)
    return tuple(stamps)


@contextmanager
def followed(
    run_dir: Path, version: Version = "last", memory_bytes: int = 2 * 1024**3, say: Callable[[str], None] = print
) -> Iterator[FollowedRun]:
    """The run, until this is left; raises RunUnusable, Refused where the run has nothing to write with yet."""
    with ExitStack() as stack:
        pins: Pins | None = None
        if run_dir.is_dir():
            try:
                pins = stack.enter_context(pinning(run_dir))
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                say(f"{run_dir} cannot hold files for this server ({error.strerror}): let its run not go on meanwhile")
        run = FollowedRun(run_dir, pins, version, memory_bytes)
        if not run.first.models():
            raise Refused(f"{run_dir} holds no model yet; let the run go on first")
        yield run
