"""A relay between plain sockets: what it passes on, when, and what it does not."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from dipaco.network import Network
from dipaco.relay import Relays

PATIENCE_S = 20.0


@contextlib.contextmanager
def linked(network: Network) -> Iterator[tuple[Relays, socket.socket]]:
    """A relay to an echoing server, and a connection through it."""
    with echoing() as address, Relays(address, network, 1) as relays, connect(relays.addresses[0]) as connection:
        yield relays, connection


@contextlib.contextmanager
def echoing() -> Iterator[str]:
    """The address of a server that sends back what it hears."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        over = threading.Event()

        def serve() -> None:
            with contextlib.ExitStack() as opened:
                while not over.is_set():
                    with contextlib.suppress(TimeoutError):
                        connection = opened.enter_context(server.accept()[0])
                        threading.Thread(target=echo, args=(connection,), daemon=True).start()

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        over.set()
        thread.join()


def echo(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := connection.recv(1 << 16):
            connection.sendall(data)


def connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), PATIENCE_S)


def answer(connection: socket.socket, data: bytes) -> bytes:
    """What comes back, as much as was sent."""
    sender = threading.Thread(target=connection.sendall, args=(data,))
    sender.start()
    found = b""
    while len(found) < len(data) and (more := connection.recv(1 << 16)):
        found += more
    sender.join()
    return found


def test_bytes_pass_unchanged_both_ways() -> None:
    data = bytes(range(256)) * 4096
    with echoing() as address, Relays(address, Network(loss=0.0001, jitter_s=0.0), 1) as relays:
        with connect(relays.addresses[0]) as connection:
            assert answer(connection, data) == data
        assert relays.counts().passed_bytes == 2 * len(data)


def test_latency_is_added_each_way() -> None:
    with linked(Network(latency_s=0.15)) as (_, connection):
        begin = time.monotonic()
        assert answer(connection, b"x") == b"x"
        assert time.monotonic() - begin >= 0.3


def test_the_rate_is_the_lines() -> None:
    data = bytes(50_000)
    with linked(Network(rate_bits_per_s=1e6)) as (_, connection):
        begin = time.monotonic()
        assert answer(connection, data) == data
        assert time.monotonic() - begin >= 0.4


def test_a_drop_resets_the_connections_of_one_worker_alone() -> None:
    with echoing() as address, Relays(address, Network(), 1, count=2) as relays:
        with connect(relays.addresses[0]) as mine, connect(relays.addresses[1]) as other:
            assert answer(mine, b"a") == answer(other, b"a") == b"a"
            relays.drop(0)
            with pytest.raises(ConnectionResetError):
                mine.recv(1)
            assert answer(other, b"b") == b"b"
        with connect(relays.addresses[0]) as again:
            assert answer(again, b"c") == b"c"
        assert (relays.counts().drops, relays.counts().cut_connections) == (1, 1)


def test_a_partition_is_silent_and_what_was_sent_in_it_arrives_afterwards() -> None:
    with echoing() as address, Relays(address, Network(), 1) as relays:
        with connect(relays.addresses[0]) as old:
            assert answer(old, b"a") == b"a"
            relays.part(0)
            old.sendall(b"b")
            with connect(relays.addresses[0]) as new:
                new.sendall(b"n")
                for connection in (old, new):
                    connection.settimeout(0.3)
                    with pytest.raises(TimeoutError):
                        connection.recv(1)
                    connection.settimeout(PATIENCE_S)
                relays.heal(0)
                assert (old.recv(1), new.recv(1)) == (b"b", b"n")
        assert relays.counts().partitions == 1


def test_nobody_behind_it_is_a_connection_that_is_reset() -> None:
    with echoing() as address:
        pass
    with Relays(address, Network(), 1) as relays:
        with pytest.raises(ConnectionResetError), connect(relays.addresses[0]) as connection:  # at once, or when read
            connection.recv(1)
        assert relays.counts().refused_connections == 1


def test_an_end_travels_behind_the_last_bytes() -> None:
    with echoing() as address, Relays(address, Network(latency_s=0.1), 1, cut_after_bytes=(9, 9)) as relays:
        with connect(relays.addresses[0]) as connection:
            connection.sendall(bytes(30))
            connection.settimeout(PATIENCE_S)
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(100) in (b"", bytes(9))
        assert relays.counts().cut_connections >= 1


def test_what_is_under_way_is_bounded() -> None:
    """A receiver behind a partition does not make the relay hold more than the line does."""
    with linked(Network(rate_bits_per_s=1e9)) as (relays, connection):
        assert answer(connection, b"a") == b"a"
        relays.part(0)
        connection.settimeout(0.5)
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < 64 << 20:
                sent += connection.send(bytes(1 << 16))
        assert sent < 32 << 20
