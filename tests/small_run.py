"""A small run inside the process of a test: its coordinator in a thread, its worker wherever the test wants it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

from configs.schema import Config
from coordinator.serving import serve_until, write_config
from dipaco.run_digest import run_digest
from protocol.address import parse_address
from scripts.crash_points import finished_run, small_config
from worker.calls import Coordinator
from worker.client import WorkerClient
from worker.loop import Worker
from worker.probe import capabilities

PATIENCE_S = 120.0


class SmallRun:
    """The run of scripts/crash_points.py, or of another configuration, in `folder`."""

    def __init__(self, folder: Path, config: Config | None = None) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.run_dir = folder / "run"
        self.run_dir.mkdir()
        self._config = config or small_config(folder)
        write_config(self._config, self.run_dir)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self.address = ""

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(PATIENCE_S)

    async def _serve(self) -> None:
        await serve_until(
            asyncio.Event(), self._config, self.run_dir, "127.0.0.1:0", ready=self._told, say=lambda line: None
        )

    def _told(self, address: str) -> None:
        self.address = address
        self._ready.set()

    def worker(self, address: str = "", say: Callable[[str], None] = lambda line: None) -> Worker:
        """A worker of the run; `address` leads to it by another way, `say` hears what it tells."""
        target = parse_address(address or self.address)

        def connect(patience_s: float | None) -> Coordinator:
            return WorkerClient(target, patience_s=patience_s)

        return Worker(connect, self.folder / "cache", "worker", capabilities(1, 1 << 30), say)

    def digest(self) -> str:
        """What the run came to, once it is over."""
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        return run_digest(finished_run(self.run_dir), everything=True)


def undisturbed_digest(folder: Path) -> str:
    run = SmallRun(folder)
    run.start()
    run.worker().run()
    return run.digest()
