"""The durable facts of a run as frozen rows, and the in-memory tables that hold them. No socket, file, thread or clock.

Everything that decides the outcome is a row; a decision returns the rows it changes, the journal stores them in one
transaction, and only then are they applied here. Workers and deadlines are not durable: they come back by themselves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple

from coordinator.arrivals import Gaps
from protocol.tasks import BlobRef, Capabilities, Checkpoint, ModuleRef

# Of a path: the newest versions of its modules, or those with which it did best on its part of the stop split.
Version = Literal["last", "best"]


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of the run. `step` is the group of tasks it is at; `result` is what later stages read."""

    table: ClassVar[str] = "stages"
    name: str
    kind: str
    model: str
    after: tuple[str, ...]
    status: Literal["waiting", "running", "done"] = "waiting"
    step: int = 0
    fingerprint: str = ""
    started_s: float = 0.0
    finished_s: float = 0.0
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return self.name


class Holder(NamedTuple):
    """A worker that holds a lease of a task, under its fencing token."""

    worker_id: str
    fence: int


@dataclass(frozen=True, slots=True)
class Claim:
    """A complete result of a TRAIN task that does not count yet. `outlier` says why its norms are doubted."""

    identity: str
    worker: str
    fingerprint: str
    fence: int
    outputs: dict[str, BlobRef]
    norms: dict[str, float]
    result: dict[str, Any]
    wall_s: float
    outlier: str = ""


@dataclass(frozen=True, slots=True)
class Task:
    """One unit of work. A TRAIN spec follows from shards and modules when it is leased, others stand in `spec`.

    At most two holders: a second one where the first is overdue or slow. `fence` is the highest token given out.
    `checkpoint` is the farthest that a holder has come, for the next one to go on from.
    """

    table: ClassVar[str] = "tasks"
    task_id: str
    stage: str
    kind: str
    phase: int
    subject: str
    step: int = 0
    local: bool = False
    status: Literal["ready", "leased", "done"] = "ready"
    holders: tuple[Holder, ...] = ()
    fence: int = 0
    spec: dict[str, Any] = field(default_factory=dict)
    failures: tuple[str, ...] = ()
    checkpoint: Checkpoint | None = None
    outputs: dict[str, BlobRef] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    claims: tuple[Claim, ...] = ()
    audited: bool = False

    @property
    def key(self) -> str:
        return self.task_id

    def holder(self, worker_id: str) -> Holder | None:
        """The lease of a worker, if it has one."""
        return next((holder for holder in self.holders if holder.worker_id == worker_id), None)

    def held_by(self, holders: Iterable[Holder]) -> Task:
        """The task with these of its holders alone; without one it is ready to be leased."""
        kept = tuple(holders)
        return replace(self, status="leased" if kept else "ready", holders=kept)

    @property
    def steps_kept(self) -> int:
        """The inner steps that a new holder need not take."""
        return self.checkpoint.steps if self.checkpoint else 0

    @property
    def independent(self) -> bool:
        """Whether every holder must compute the task from its start: its results are compared with one another."""
        return self.audited or bool(self.claims)


@dataclass(frozen=True, slots=True)
class Module:
    """The newest durable version of a module, its outer momentum, and the versions kept before it."""

    table: ClassVar[str] = "modules"
    model: str
    module_id: str
    version: int
    params: BlobRef
    momentum: BlobRef | None = None
    history: tuple[BlobRef, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.model}/{self.module_id}"


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard of a model: its data, how far it has been trained, and the state of its inner optimizer."""

    table: ClassVar[str] = "shards"
    model: str
    shard: int
    path_index: int
    files: tuple[BlobRef, ...]
    training_tokens: int
    sequences: int
    manifest: BlobRef | None = None
    phase: int = 0
    steps_done: int = 0
    adam_step: int = 0
    inner_state: BlobRef | None = None

    @property
    def key(self) -> str:
        return f"{self.model}/{self.shard}"


@dataclass(frozen=True, slots=True)
class Best:
    """The modules with which a path of the mixture did best on its stop sequences since the last re-shard.

    `loss_sum` in nats over `tokens`; `phase` is the one that made these versions. Without modules nothing has been
    measured since.
    """

    table: ClassVar[str] = "best"
    path_index: int
    phase: int = 0
    modules: tuple[ModuleRef, ...] = ()
    loss_sum: float = 0.0
    tokens: int = 0

    @property
    def key(self) -> str:
        return str(self.path_index)


@dataclass(frozen=True, slots=True)
class Standing:
    """Whether the run goes on: `paused` holds the reason in one sentence, `bytes_moved` counts the wire by category.

    `held_s` and `leases_lost` are of all leases that have ended (coordinator/losses.py).
    """

    table: ClassVar[str] = "standing"
    paused: str = ""
    finished: bool = False
    bytes_moved: dict[str, int] = field(default_factory=dict)
    held_s: float = 0.0
    leases_lost: int = 0

    @property
    def key(self) -> str:
        return "run"


@dataclass(frozen=True, slots=True)
class Conduct:
    """What is held against a worker: the tasks in which it is suspected of a wrong result, and why it is banned."""

    table: ClassVar[str] = "conduct"
    identity: str
    suspected: tuple[str, ...] = ()
    banned: str = ""
    wall_s: float = 0.0

    @property
    def key(self) -> str:
        return self.identity


Row = Stage | Task | Module | Shard | Best | Standing | Conduct


@dataclass(slots=True)
class Worker:
    """A worker as last heard of (monotonic seconds). `identity`: what its conduct is held under (else its name)."""

    worker_id: str
    name: str
    capabilities: Capabilities
    last_seen_s: float
    task_id: str = ""
    steps: int = 0
    loss: float = float("nan")
    tokens_per_s: float = 0.0
    beats: Gaps = field(default_factory=Gaps)
    step_times: Gaps = field(default_factory=Gaps)
    identity: str = ""

    def __post_init__(self) -> None:
        self.identity = self.identity or self.name


@dataclass(slots=True)
class Lifeline:
    """What is known of a live lease (monotonic seconds): `overdue_s` lets a second holder join, `ends_s` ends it."""

    ends_s: float
    overdue_s: float
    heard_s: float
    advanced_s: float
    began_s: float
    steps: int = 0
    tokens: int = 0


class State:
    """All rows of a run, by key, and what is known of the workers."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self.stages: dict[str, Stage] = {}
        self.tasks: dict[str, Task] = {}
        self.modules: dict[str, Module] = {}
        self.shards: dict[str, Shard] = {}
        self.best: dict[str, Best] = {}
        self.standing = Standing()
        self.conduct: dict[str, Conduct] = {}
        self.workers: dict[str, Worker] = {}
        self.lifelines: dict[tuple[str, int], Lifeline] = {}
        self.beats = Gaps()
        self.apply(rows)

    def apply(self, rows: Iterable[Row]) -> None:
        """Make rows current that the journal holds already."""
        for row in rows:
            match row:
                case Stage():
                    self.stages[row.key] = row
                case Task():
                    self.tasks[row.key] = row
                case Module():
                    self.modules[row.key] = row
                case Shard():
                    self.shards[row.key] = row
                case Best():
                    self.best[row.key] = row
                case Standing():
                    self.standing = row
                case Conduct():
                    self.conduct[row.key] = row

    def copy(self) -> State:
        """The same rows in tables of their own, without workers: for a draft, or to be read in another thread."""
        other = State()
        other.stages, other.tasks = dict(self.stages), dict(self.tasks)
        other.modules, other.shards = dict(self.modules), dict(self.shards)
        other.best, other.standing, other.conduct = dict(self.best), self.standing, dict(self.conduct)
        return other

    def forget_tasks(self, task_ids: Iterable[str]) -> None:
        """Drop finished tasks from memory; the journal keeps them."""
        for task_id in task_ids:
            del self.tasks[task_id]

    def shards_of(self, model: str) -> list[Shard]:
        """The shards of a model, ascending."""
        return sorted((row for row in self.shards.values() if row.model == model), key=lambda row: row.shard)

    def modules_of(self, model: str) -> list[Module]:
        """The modules of a model, by level and index."""
        rows = (row for row in self.modules.values() if row.model == model)
        return sorted(rows, key=lambda row: tuple(int(part) for part in row.module_id.split(".")))

    def tasks_of(self, stage: str) -> list[Task]:
        """The tasks of a stage, in the order in which they were made."""
        return [row for row in self.tasks.values() if row.stage == stage]
