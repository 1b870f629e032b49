"""One connection to a coordinator: calls with a deadline, tried again in this one place while nobody answers.

What is called must be idempotent. Refusals leave as the exceptions of protocol.errors. Threads may share a connection.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeVar

import grpc

from protocol.address import Address
from protocol.channel import call_metadata, open_channel
from protocol.errors import Unavailable, WaitingForRoom, from_rpc_error
from protocol.joinfile import JoinFile
from protocol.patience import Patience

T = TypeVar("T")


def ignore(_: object) -> None:
    """For those who do not want to hear."""


class Connection:
    """Connects when it is first used. `say` is told, in one sentence, when a silence starts and when it is over."""

    def __init__(
        self, address: Address, join: JoinFile | None, *, insecure: bool = False, say: Callable[[str], None] = ignore
    ) -> None:
        """Raises NotAllowed where traffic would leave the machine unprotected and `insecure` does not ask for it."""
        self.address = address
        self.channel = open_channel(address, join, insecure=insecure)
        self._metadata = call_metadata(join)
        self._unanswered_plain = join is None
        self._say = say
        self._silent = False
        self._closed = threading.Event()
        self._generator = random.Random()

    def patience(self, limit_s: float | None) -> Patience:
        """How long one call, or one transfer, is tried (None: no limit)."""
        return Patience(limit_s, self._generator)

    def once(self, method: Callable[..., Any], request: Any, deadline_s: float) -> Any:
        """One attempt of a call."""
        with self.translated():
            result = method(request, timeout=deadline_s, metadata=self._metadata)
            self._unanswered_plain = False
            return result

    def stream(self, method: Callable[..., Any], request: Any, deadline_s: float) -> Generator[Any, None, None]:
        """The messages of one answer that is a stream; closing the generator ends the call."""
        with self.translated():
            messages = method(request, timeout=deadline_s, metadata=self._metadata)
            try:
                yield from messages
            finally:
                messages.cancel()

    def call(self, method: Callable[..., Any], request: Any, deadline_s: float, patience_s: float | None) -> Any:
        """Attempts of at most `deadline_s` seconds each until one is answered; Unavailable after `patience_s`."""
        return self.patiently(lambda: self.once(method, request, deadline_s), self.patience(patience_s))

    def patiently(self, attempt: Callable[[], T], patience: Patience) -> T:
        """The attempt's result; while nobody answers, or has no room, it is made again, as long as patience lasts."""
        while True:
            try:
                result = attempt()
            except (Unavailable, WaitingForRoom) as error:
                wait_s = patience.next_wait_s(time.monotonic())
                if wait_s is None or self._closed.is_set():
                    raise
                self._tell(silent=True, sentence=f"{error}; trying again")
                self._closed.wait(wait_s)
            else:
                self._tell(silent=False, sentence=f"{self.address} answers again")
                return result

    @contextlib.contextmanager
    def translated(self) -> Iterator[None]:
        """Domain exceptions instead of gRPC's."""
        if self._closed.is_set():
            raise self._was_closed()
        try:
            yield
        except grpc.RpcError as error:
            raise from_rpc_error(error, str(self.address), unanswered_plain=self._unanswered_plain) from None
        except ValueError:
            if self._closed.is_set():  # gRPC's answer to a call on a closed channel
                raise self._was_closed() from None
            raise

    def close(self) -> None:
        """End the calls under way (they raise Unavailable) and every later one. Any thread may call it."""
        self._closed.set()
        self.channel.close()

    def _was_closed(self) -> Unavailable:
        return Unavailable(f"the connection to {self.address} was closed on this side")

    def _tell(self, *, silent: bool, sentence: str) -> None:
        """Tell of the start and of the end of a silence, not of each attempt."""
        if silent != self._silent:
            self._silent = silent
            self._say(sentence)
