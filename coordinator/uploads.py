"""One upload on its way into the spool: the async face of a spool sink, off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from coordinator.expected import ExpectedOutput
from coordinator.spool import Spool
from coordinator.traffic import Traffic
from protocol.errors import DiskFull, RejectedTensor
from protocol.tensors import UploadHeader


class Upload:
    """Takes the bytes of one output of a leased task; counts them by category when the output is whole."""

    def __init__(
        self,
        spool: Spool,
        header: UploadHeader,
        expected: Mapping[str, ExpectedOutput],
        traffic: Traffic,
        no_room: Callable[[], None] = lambda: None,
    ) -> None:
        """Opens the sink: call it off the event loop. Raises RejectedTensor where the task has no such output.

        `no_room` is called, on the event loop, where bytes could not be written for that reason.
        """
        if header.output not in expected:
            raise RejectedTensor(
                f"task {header.task_id} has no output {header.output!r}; it has {', '.join(sorted(expected))}"
            )
        self._sink = spool.open(header, expected[header.output])
        self._moved = header.size - header.offset
        self._kind = header.kind
        self._traffic = traffic
        self._no_room = no_room

    async def write(self, data: bytes) -> None:
        await self._with_room(self._sink.write, data)

    async def finish(self) -> int:
        size: int = await self._with_room(self._sink.finish)
        self._traffic.uploaded(self._kind, self._moved)
        return size

    async def _with_room(self, call: Callable[..., Any], *args: object) -> Any:
        try:
            return await asyncio.to_thread(call, *args)
        except DiskFull:
            self._no_room()
            raise

    async def abort(self) -> None:
        await asyncio.to_thread(self._sink.abort)
