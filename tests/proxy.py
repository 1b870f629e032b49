"""A bad network for tests: a TCP proxy between worker and coordinator that cuts, stalls, delays and parts them."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass

READ_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True)
class Faults:
    """What happens to every connection. `cut_after_bytes`: a range from which each direction draws its length.

    `delay_s` holds every piece back; `stall_s` holds one back for so long, after half of the bytes before a cut.
    """

    cut_after_bytes: tuple[int, int] | None = None
    delay_s: float = 0.0
    stall_s: float = 0.0


class Proxy:
    """Listens on a port of its own and passes on to `target` (host:port); its own event loop runs in a thread."""

    def __init__(self, target: str, faults: Faults, seed: int = 0) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._faults = faults
        self._generator = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._writers: set[asyncio.StreamWriter] = set()
        self._parted = False
        self.cuts = 0
        self.passed_bytes = 0
        self.address = ""

    def __enter__(self) -> Proxy:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def part(self, seconds: float, then: Callable[[], None] = lambda: None) -> None:
        """Nothing passes for so long, in both directions, and nobody is told; new connections are refused."""
        self._loop.call_soon_threadsafe(self._set_parted, True)
        self._loop.call_soon_threadsafe(self._loop.call_later, seconds, self._set_parted, False)
        self._loop.call_soon_threadsafe(self._loop.call_later, seconds, then)

    def _set_parted(self, parted: bool) -> None:
        """A partition that is over has broken every connection that lived through it."""
        self._parted = parted
        if not parted:
            for writer in list(self._writers):
                writer.transport.abort()

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._connected, "127.0.0.1", 0)

    async def _close(self) -> None:
        self._server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0.05)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._parted:
            writer.transport.abort()
            return
        try:
            there_reader, there = await asyncio.open_connection(self._host, self._port)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, there}
        try:
            await asyncio.wait(
                [
                    asyncio.ensure_future(self._pass_on(reader, there)),
                    asyncio.ensure_future(self._pass_on(there_reader, writer)),
                ],
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            self._writers -= {writer, there}
            writer.transport.abort()
            there.transport.abort()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One direction, until its end or its cut."""
        limits = self._faults.cut_after_bytes
        left = self._generator.randint(*limits) if limits else None
        stalls_at = None if left is None or not self._faults.stall_s else left // 2
        try:
            while data := await reader.read(READ_BYTES if left is None else min(READ_BYTES, left)):
                await self._hold_back()
                writer.write(data)
                await writer.drain()
                self.passed_bytes += len(data)
                if left is not None:
                    left -= len(data)
                    if stalls_at is not None and left < stalls_at:
                        stalls_at = None
                        await asyncio.sleep(self._faults.stall_s)
                    if left <= 0:
                        self.cuts += 1
                        return
        except ConnectionError:
            return

    async def _hold_back(self) -> None:
        if self._faults.delay_s:
            await asyncio.sleep(self._faults.delay_s)
        while self._parted:
            await asyncio.sleep(0.02)
