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
from protocol.admission import certificate_needed
from protocol.channel import RENEWED_TOKEN_KEY, call_metadata, open_channel
from protocol.credentials import Credentials
from protocol.errors import HUNG_UP, NotAllowed, Unavailable, WaitingForRoom, from_rpc_error
from protocol.handshake import requires_certificate
from protocol.patience import Patience

T = TypeVar("T")


def ignore(_: object) -> None:
    """For those who do not want to hear."""


class Connection:
    """Connects when it is first used. `say` is told, in one sentence, when a silence starts and when it is over."""

    def __init__(
        self,
        address: Address,
        credentials: Credentials | None,
        *,
        insecure: bool = False,
        say: Callable[[str], None] = ignore,
    ) -> None:
        """Raises NotAllowed where traffic would leave the machine unprotected and `insecure` does not ask for it."""
        self.address = address
        self.channel = open_channel(address, None if credentials is None else credentials.join, insecure=insecure)
        self._credentials = credentials
        self._unanswered_plain = credentials is None
        self._say = say
        self._silent = False
        self._closed = threading.Event()
        self._generator = random.Random()

    def patience(self, limit_s: float | None) -> Patience:
        """How long one call, or one transfer, is tried (None: no limit)."""
        return Patience(limit_s, self._generator)

    def once(self, method: Any, request: Any, deadline_s: float) -> Any:
        """One attempt of a call."""
        with self.translated():
            result, call = method.with_call(request, timeout=deadline_s, metadata=call_metadata(self._token))
            self._unanswered_plain = False
            self._follow_rotation(call)
            return result

    def stream(self, method: Callable[..., Any], request: Any, deadline_s: float) -> Generator[Any, None, None]:
        """The messages of one answer that is a stream; closing the generator ends the call."""
        with self.translated():
            messages = method(request, timeout=deadline_s, metadata=call_metadata(self._token))
            try:
                yield from messages
            finally:
                messages.cancel()

    def call(self, method: Callable[..., Any], request: Any, deadline_s: float, patience_s: float | None) -> Any:
        """Attempts of at most `deadline_s` seconds each until one is answered; Unavailable after `patience_s`."""
        return self.patiently(lambda: self.once(method, request, deadline_s), self.patience(patience_s))

    def patiently(self, attempt: Callable[[], T], patience: Patience) -> T:
        """The attempt's result; while nobody answers, or has no room, it is made again, as long as patience lasts.

        Also where the token was refused, and another one is there by now.
        """
        while True:
            token = self._token
            try:
                result = attempt()
            except NotAllowed as error:
                if type(error) is not NotAllowed or not self._credentials or not self._credentials.renewed_since(token):
                    raise
            except (Unavailable, WaitingForRoom) as error:
                self._check_handshake(error)
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

    @property
    def _token(self) -> str:
        return "" if self._credentials is None else self._credentials.token

    def _follow_rotation(self, call: Any) -> None:
        """Take over the token that came with an answer. Only TLS brings one: nobody else may replace it."""
        renewed = dict(call.trailing_metadata() or ()).get(RENEWED_TOKEN_KEY, "")
        if renewed and self._credentials is not None:
            self._credentials.renew(str(renewed))

    def _check_handshake(self, error: Exception) -> None:
        """Raise NotAllowed where the other side hung up because it was shown no certificate."""
        if self._credentials is None or self._closed.is_set() or not any(sign in str(error) for sign in HUNG_UP):
            return
        join = self._credentials.join
        if join.certificate_pem is None and requires_certificate(self.address, join.ca_pem):
            raise NotAllowed(certificate_needed(str(self.address))) from None

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
