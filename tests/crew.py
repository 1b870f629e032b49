"""Several workers of one small run in threads of a test, some of which lie about what they have computed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.schema import Config
from coordinator.serving import serve_until, write_config
from coordinator.snapshot import RunSnapshot
from dipaco.run_digest import run_digest
from model import tensor_file
from protocol.address import Address, parse_address
from protocol.errors import NotAllowed
from protocol.tasks import BlobRef, TaskResult
from protocol.tensors import UploadHeader
from scripts.crash_points import finished_run, small_config
from worker.calls import Coordinator
from worker.client import WorkerClient
from worker.loop import Worker
from worker.outcome import TaskOutcome
from worker.probe import capabilities
from worker.task import run_task

PATIENCE_S = 120.0
# Of (task id, tensors of a contribution by name): what is sent in their place; the same object sends the truth.
Lie = Callable[[str, dict[str, Any]], dict[str, Any]]


def config_for(folder: Path, phases: int = 2, **execution: Any) -> Config:
    """The run of scripts/crash_points.py with other phases and another execution; same bits for any execution."""
    document = small_config(folder).model_dump(mode="json")
    document["experiment"]["stages"][-1]["phases"] = phases
    document["execution"] |= execution
    return Config.model_validate(document)


class LyingClient(WorkerClient):
    """Sends other outer gradients than were computed, under a true digest of what it sends."""

    def __init__(self, target: Address, lie: Lie, lied: threading.Event, **more: Any) -> None:
        super().__init__(target, **more)
        self._lie, self._lied = lie, lied
        self._sent: dict[str, BlobRef] = {}

    def upload(self, path: Path, header: UploadHeader, *more: Any, **options: Any) -> int:
        if header.kind == "module":
            told = tensor_file.read(path)
            tensors = self._lie(header.task_id, {name: values.copy() for name, values in told.items()})
            digest, size = tensor_file.write(path, tensors)
            header = header.model_copy(update={"digest": digest, "size": size})
            self._sent[header.output] = BlobRef(digest=digest, size=size)
        return super().upload(path, header, *more, **options)

    def complete(self, worker_id: str, task_id: str, fence: int, result: TaskResult) -> bool:
        lies = any(result.outputs[name] != ref for name, ref in self._sent.items())
        outputs, self._sent = {**result.outputs, **self._sent}, {}
        answer = super().complete(worker_id, task_id, fence, result.model_copy(update={"outputs": outputs}))
        if lies:
            self._lied.set()
        return answer


class Crew:
    """A run whose coordinator can be stopped and started again, and its workers by name."""

    def __init__(self, folder: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run_dir = folder / "run"
        self.run_dir.mkdir()
        self.said: list[str] = []
        self.lied = threading.Event()
        self.refused: dict[str, str] = {}
        self._folder, self._config = folder, config
        self._threads: dict[str, threading.Thread] = {}
        self._address = "127.0.0.1:0"
        self._computing = threading.Lock()
        self._run_task = run_task
        monkeypatch.setattr("worker.leased_task.run_task", self._one_at_a_time)
        # Whether a task waits until a liar has lied, by worker and spec: so that the liar gets its turn.
        self.waits: Callable[[Any], bool] = lambda spec: False

    def _one_at_a_time(self, spec: Any, *arguments: Any) -> TaskOutcome:
        """Numerics are a property of the process: tasks in threads of one take turns."""
        liar = threading.current_thread().name == "liar"
        if not liar and self.waits(spec):
            assert self.lied.wait(PATIENCE_S), "the liar never got a task"
        with self._computing:
            return self._run_task(spec, *arguments)

    def start(self) -> None:
        """Start the coordinator, or start it again at the same address."""
        write_config(self._config, self.run_dir)
        self._ready = threading.Event()
        self._coordinator = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._coordinator.start()
        assert self._ready.wait(PATIENCE_S)

    async def _serve(self) -> None:
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        await serve_until(
            self._stopped, self._config, self.run_dir, self._address, ready=self._told, say=self.said.append
        )

    def _told(self, address: str) -> None:
        self._address = address
        self._ready.set()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._coordinator.join(PATIENCE_S)

    def hire(self, name: str, lie: Lie | None = None) -> None:
        """A worker in a thread of its own; returns once it has joined."""
        joined, target = threading.Event(), parse_address(self._address)

        def connect(patience_s: float | None) -> Coordinator:
            if lie is None:
                return WorkerClient(target, patience_s=patience_s)
            return LyingClient(target, lie, self.lied, patience_s=patience_s)

        def say(line: str) -> None:
            if line.startswith("joined"):
                joined.set()

        def work() -> None:
            try:
                Worker(connect, self._folder / f"cache-{name}", name, capabilities(1, 1 << 30), say).run()
            except NotAllowed as error:
                self.refused[name] = str(error)

        self._threads[name] = threading.Thread(target=work, name="liar" if lie else name, daemon=True)
        self._threads[name].start()
        assert joined.wait(PATIENCE_S)

    def finished(self) -> RunSnapshot:
        """The run, once everybody has left."""
        for thread in [*self._threads.values(), self._coordinator]:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
        return finished_run(self.run_dir)

    def digest(self) -> str:
        return run_digest(self.finished(), everything=True)
