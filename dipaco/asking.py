"""Asking a coordinator for the status of its run, once or again and again."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

from dipaco.ending import Refused
from protocol.address import parse_address
from protocol.credentials import Credentials
from protocol.errors import Unavailable
from protocol.joinfile import JoinFile
from worker.client import WorkerClient


def address_to_ask(address: str | None, join: Path | None) -> str:
    """The address that was given, or else the join file's; raises BadJoinFile, Refused where neither names one."""
    found = address or (None if join is None else JoinFile.read(join).address)
    if not found:
        raise Refused(
            "no address of a coordinator: give HOST:PORT"
            + (", or --join FILE" if join is None else f" ({join} holds none)")
            + "; `dipaco certs RUN --address HOST:PORT` notes it in the join file"
        )
    return found


def ask_status(address: str, *, join: Path | None, insecure: bool, patience_s: float) -> dict[str, Any]:
    """The status of the run at an address. Raises BadAddress, BadJoinFile, NotAllowed; Unavailable after a while."""
    card = None if join is None else Credentials.read(join)
    with WorkerClient(parse_address(address), card, insecure=insecure, patience_s=patience_s) as client:
        return plain(client.status())


class StatusSource:
    """Asks the coordinators of a local run, one after the other as they are restarted, without ever waiting for one."""

    def __init__(self, join: Path | None = None) -> None:
        self._card = None if join is None else Credentials.read(join)
        self._client: WorkerClient | None = None
        self._address = ""

    def __enter__(self) -> StatusSource:
        return self

    def __exit__(self, *_: object) -> None:
        if self._client is not None:
            self._client.close()

    def ask(self, address: str) -> dict[str, Any] | None:
        """The newest status, or None while nobody answers."""
        if address != self._address or self._client is None:
            self.__exit__()
            self._client, self._address = WorkerClient(parse_address(address), self._card, patience_s=0.5), address
        with contextlib.suppress(Unavailable):
            return plain(self._client.status())
        return None


def plain(status: dict[str, Any]) -> dict[str, Any]:
    """The same with None for what is not a number: JSON has no word for it."""
    return {key: _plain(value) for key, value in status.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return plain(value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
