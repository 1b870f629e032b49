"""Who may listen where, and what a taken port is answered."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from coordinator.server import CannotListen, start_server
from protocol.address import BadAddress
from tests.loopback import BookHandlers


def listen(tmp_path: Path, address: str, *, insecure: bool = False) -> tuple[str, int, bool]:
    """Start and stop a server; returns its host, port, and whether it was secure."""

    async def start() -> tuple[str, int, bool]:
        server = await start_server(BookHandlers(tmp_path), address, insecure=insecure)
        await server.stop(0.0)
        return server.address.host, server.address.port, server.secure

    return asyncio.run(start())


def test_port_0_is_replaced_by_the_real_one(tmp_path: Path) -> None:
    host, port, secure = listen(tmp_path, "127.0.0.1:0")
    assert (host, secure) == ("127.0.0.1", False)
    assert port > 0


def test_plain_traffic_stays_on_loopback(tmp_path: Path) -> None:
    with pytest.raises(CannotListen, match="dipaco certs"):
        listen(tmp_path, "0.0.0.0:0")


def test_insecure_listens_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert listen(tmp_path, "0.0.0.0:0", insecure=True)[0] == "0.0.0.0"
    assert "without TLS and without a token" in caplog.text


def test_a_taken_port_is_refused(tmp_path: Path) -> None:
    async def twice() -> None:
        first = await start_server(BookHandlers(tmp_path), "127.0.0.1:0")
        try:
            await start_server(BookHandlers(tmp_path), str(first.address))
        finally:
            await first.stop(0.0)

    with pytest.raises(CannotListen, match="taken"):
        asyncio.run(twice())


@pytest.mark.parametrize("address", ["", "7070", "localhost", "localhost:", "localhost:x", "localhost:70000", "::1:70"])
def test_a_mistyped_address_is_refused(tmp_path: Path, address: str) -> None:
    with pytest.raises(BadAddress, match="address"):
        listen(tmp_path, address)
