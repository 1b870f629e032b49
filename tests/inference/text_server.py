"""A server of texts in the process of a test: a tiny 2 x 2 mixture over bytes, free ports, a loop in a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from configs.schema import LevelConfig, ModelConfig, TopologyConfig
from corpus.tokenizer import Tokenizer, byte_tokenizer
from inference.answering import Answering
from inference.batch_engine import BatchEngine, BatchLimits
from inference.engine import Engine, Request
from inference.metrics import ServerMetrics
from inference.module_cache import ModuleCache
from inference.path_source import PathSource
from inference.served_model import Limits, ServedModel
from inference.server import Doors, OpenDoors, open_doors
from inference.stream import Reading
from model.initial import write_initial_module
from model.layout import module_spec
from model.store import BlobStore
from model.topology import Topology
from routing.router import RouteState
from tests.inference.served_thread import PATIENCE_S, ServedThread

NAME = "tiny"
PREFIX_TOKENS = 8
SHAPE = ModelConfig(
    blocks=2, hidden_size=32, heads=4, kv_heads=2, intermediate_size=48, sequence_length=128, init_std=0.3
)
LEVELS = [LevelConfig(modules=2, blocks=[0], embedding=True), LevelConfig(modules=2, blocks=[1], head=True)]


class ByLastToken:
    """A router that looks at the newest token alone, so that a text changes its path often."""

    version, num_paths = "by last token", 4

    def route(self, tokens: np.ndarray, state: RouteState | None = None) -> tuple[np.ndarray, RouteState]:
        posterior = np.zeros(self.num_paths)
        posterior[int(tokens[-1]) % self.num_paths] = 1.0
        return posterior, RouteState(len(tokens) - 1)


@dataclass
class TinyModel:
    """Modules of random numbers, the same for the same seed."""

    folder: Path
    tokenizer: Tokenizer
    topology: Topology
    _alone: dict[int, Engine] = field(default_factory=dict)

    @classmethod
    def make(cls, folder: Path) -> TinyModel:
        return cls(folder, byte_tokenizer(), Topology.from_config(TopologyConfig(levels=LEVELS)))

    def paths(self, seed: int = 0) -> PathSource:
        store, vocab_size = BlobStore(self.folder / "blobs"), self.tokenizer.vocab_size
        digests = {}
        for place, module_id in enumerate(self.topology.module_ids):
            file = store.scratch() / "module"
            spec = module_spec(SHAPE, vocab_size, self.topology, module_id)
            digest, _ = write_initial_module(file, spec, SHAPE, 100 * seed + place)
            store.adopt(file, digest)
            digests[module_id] = digest
        paths = [[digests[each] for each in self.topology.modules_of_path(index)] for index in range(4)]
        return PathSource(SHAPE, vocab_size, self.topology, paths, ModuleCache(store, 1 << 30))

    def engine(self, running: int = 16, waiting: int = 64) -> BatchEngine:
        reading = Reading(PREFIX_TOKENS, self.tokenizer.bos_id, self.tokenizer.eos_id)
        return BatchEngine(self.paths(), ByLastToken(), reading, limits=BatchLimits(running=running, waiting=waiting))

    def alone(self, request: Request, seed: int = 0) -> tuple[str, list[str]]:
        """The text of a request and the path of every token, by the engine without a server."""
        if seed not in self._alone:
            reading = (PREFIX_TOKENS, self.tokenizer.bos_id, self.tokenizer.eos_id)
            self._alone[seed] = Engine(self.paths(seed), ByLastToken(), *reading)
        written = list(self._alone[seed].generate(request))
        tokens = [each.token for each in written if each.finish != "stop"]
        return self.tokenizer.decode(tokens), [self.topology.path_id(each.path_index) for each in written]


class Held:
    """An engine that stops after a few tokens until it is released, so that a test can do something meanwhile."""

    TOKENS = 6  # enough for some text

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.stats, self.close = engine.stats, engine.close
        self.release = threading.Event()

    def submit(self, request: Request, emit: Callable[[Any], None], failed: Callable[[Exception], None]) -> Any:
        told: list[Any] = []

        def later(token: Any) -> None:
            if len(told) == self.TOKENS:
                assert self.release.wait(PATIENCE_S)
            told.append(token)
            emit(token)

        return self._engine.submit(request, later, failed)


class TextServer(ServedThread):
    """Open while it is entered; what is asked of it from outside happens in its loop."""

    def __init__(self, model: TinyModel, limits: Limits | None = None, engine: Any = None, **doors: Any) -> None:
        super().__init__()
        self.limits = limits or Limits(prompt_tokens=SHAPE.sequence_length - 1, new_tokens=SHAPE.sequence_length)
        self.model = model
        self.engine = engine or model.engine(self.limits.running, self.limits.waiting)
        self._doors = Doors(**{"http": "127.0.0.1:0", "grpc": "127.0.0.1:0", **doors})
        self.opened: OpenDoors
        self.answering: Answering

    @property
    def url(self) -> str:
        scheme = "http" if self._doors.tls is None else "https"
        return f"{scheme}://{self.opened.http}/v1"

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)

    def cut(self) -> None:
        self._loop.call_soon_threadsafe(self._cut.set)

    def idle(self) -> bool:
        """Whether the engine has nothing to do."""
        stats = self.engine.stats()
        return stats.running == stats.waiting == 0 and not self.answering.open_answers

    async def serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop, self._cut = asyncio.Event(), asyncio.Event()
        served = ServedModel(NAME, self.model.topology, self.model.tokenizer, 0, True, False, "snapshot-0")
        metrics = ServerMetrics()
        self.answering = Answering(self.engine, served, self.limits, metrics)
        metrics.follow(self.engine.stats, lambda: self.answering.open_answers)
        self.opened = await open_doors(self.answering, self._doors)
        self.ready.set()
        await self._stop.wait()
        self.whole = await self.opened.stop(self._cut)
        await asyncio.to_thread(self.engine.close, self.whole)
