"""Relays between the workers of a simulation and its coordinator, which do to the bytes what a bad network would.

One listens for each worker, on loopback; all of them live on one event loop in a thread. Memory is bounded: what is
under way on a line is as much as its rate and latency hold. A coordinator that does not listen is passed on as a
connection that is reset, since a relay has accepted it by then; the worker tries again as it would anyway.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections.abc import Coroutine
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from dipaco.network import Line, Network
from protocol.address import parse_address

T = TypeVar("T")

PIECE_BYTES = 16 * 1024
# On a line without a rate; one with a rate and a latency holds twice what fits it.
MOST_PIECES, LEAST_PIECES = 256, 16
PATIENCE_S = 10.0


@dataclass(slots=True)
class Counts:
    """What a relay, or all of them, did. `stalled_bytes`: those of pieces that were held up by a loss."""

    drops: int = 0
    partitions: int = 0
    cut_connections: int = 0
    refused_connections: int = 0
    stalls: int = 0
    stalled_bytes: int = 0
    passed_bytes: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(mine + theirs for mine, theirs in zip(_values(self), _values(other), strict=True)))


def _values(counts: Counts) -> list[int]:
    return list(asdict(counts).values())


class Relay:
    """One worker's link to `target`. All methods run on the event loop."""

    def __init__(
        self,
        target: str,
        network: Network,
        source: random.Random,
        cut_after_bytes: tuple[int, int] | None = None,
    ) -> None:
        """`cut_after_bytes`: a range from which every direction of every connection draws how long it lasts."""
        self._target = parse_address(target)
        self._source, self._cut_after_bytes = source, cut_after_bytes
        self._up, self._down = Line(network, source), Line(network, source)
        self._pieces = _pieces(network)
        self._whole = asyncio.Event()
        self._whole.set()
        self._connections: set[asyncio.Task[None]] = set()
        self._counts = Counts()
        self.address = ""

    async def open(self) -> None:
        """Listen on a free port."""
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        self._server.close()
        await self._reset()

    @property
    def counts(self) -> Counts:
        lines = (self._up, self._down)
        return self._counts + Counts(
            stalls=sum(line.stalls for line in lines), stalled_bytes=sum(line.stalled_bytes for line in lines)
        )

    async def drop(self) -> None:
        """Reset every connection, on both sides."""
        self._counts.drops += 1
        self._counts.cut_connections += len(self._connections)
        await self._reset()

    async def part(self) -> None:
        """From now on nothing passes, and nobody is told: what is sent waits, who connects is not answered."""
        self._counts.partitions += self._whole.is_set()
        self._whole.clear()

    async def heal(self) -> None:
        """What waited passes; connections that lived through the partition go on."""
        self._whole.set()

    async def _reset(self) -> None:
        connections = list(self._connections)
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        ends = [writer]
        try:
            await self._whole.wait()
            there_reader, there = await asyncio.open_connection(self._target.host, self._target.port)
            ends.append(there)
            await self._until_one_ends(
                self._carry(reader, there, self._up), self._carry(there_reader, writer, self._down)
            )
        except asyncio.CancelledError:
            pass  # dropped, or closed with the relay: the server that awaits this task has no use for the word
        except OSError:
            self._counts.refused_connections += len(ends) == 1
        finally:
            self._connections.discard(task)
            for end in ends:
                _abort(end)

    async def _until_one_ends(self, *directions: Coroutine[Any, Any, None]) -> None:
        tasks = [asyncio.ensure_future(direction) for direction in directions]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, line: Line) -> None:
        """One direction, until its end or its cut: pieces go in as they come, and come out when it is their time."""
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(self._pieces)
        delivery = asyncio.ensure_future(self._deliver(under_way, writer))
        left = self._source.randint(*self._cut_after_bytes) if self._cut_after_bytes else None
        loop, after_s = asyncio.get_running_loop(), 0.0
        try:
            while data := await reader.read(PIECE_BYTES if left is None else min(PIECE_BYTES, left)):
                after_s = line.arrival_s(len(data), loop.time(), after_s)
                await under_way.put((after_s, data))
                if left is not None and (left := left - len(data)) <= 0:
                    self._counts.cut_connections += 1
                    break
            await under_way.put((after_s, b""))
            await delivery
        finally:
            delivery.cancel()
            await asyncio.gather(delivery, return_exceptions=True)

    async def _deliver(self, under_way: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        """Hand the pieces on, each at its time; the end of the stream travels like they do."""
        loop = asyncio.get_running_loop()
        while True:
            at_s, data = await under_way.get()
            await asyncio.sleep(at_s - loop.time())
            await self._whole.wait()
            if not data:
                return
            self._counts.passed_bytes += len(data)  # before anybody can have read it
            writer.write(data)
            await writer.drain()


def _pieces(network: Network) -> int:
    if network.rate_bits_per_s is None:
        return MOST_PIECES
    held = 2 * network.latency_s * network.rate_bits_per_s / 8
    return max(LEAST_PIECES, min(MOST_PIECES, round(held / PIECE_BYTES)))


def _abort(writer: asyncio.StreamWriter) -> None:
    """Reset: nothing that is unsent is sent, and the other side hears of it at once."""
    connection = writer.transport.get_extra_info("socket")
    if connection is not None and not writer.transport.is_closing():
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


class Relays:
    """One relay for each worker, opened and closed with the context, on an event loop in a thread of its own."""

    def __init__(
        self,
        target: str,
        network: Network,
        seed: int,
        count: int = 1,
        *,
        cut_after_bytes: tuple[int, int] | None = None,
    ) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="relays", daemon=True)
        sources = [random.Random(f"{seed}/link/{index}") for index in range(count)]
        self._of_each = [(target, network, source, cut_after_bytes) for source in sources]
        self._relays: list[Relay] = []

    def __enter__(self) -> Relays:
        self._thread.start()
        self._run(self._open())
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE_S)
        self._loop.close()

    @property
    def addresses(self) -> list[str]:
        """Where each worker finds its coordinator."""
        return [relay.address for relay in self._relays]

    def drop(self, index: int) -> None:
        self._run(self._relays[index].drop())

    def part(self, index: int) -> None:
        self._run(self._relays[index].part())

    def heal(self, index: int) -> None:
        self._run(self._relays[index].heal())

    def counts(self) -> Counts:
        """Of all relays together."""
        return sum((relay.counts for relay in self._relays), Counts())

    async def _open(self) -> None:
        self._relays = [Relay(*of_one) for of_one in self._of_each]
        for relay in self._relays:
            await relay.open()

    async def _close(self) -> None:
        for relay in self._relays:
            await relay.close()
        await asyncio.sleep(0)  # aborted transports close in the loop's next turn

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)
