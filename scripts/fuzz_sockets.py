"""Attacks below the calls: bytes that are no HTTP/2, HTTP/2 that stops half way, TLS where there is none, silence."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Callable, Iterator

from protocol.address import parse_address
from scripts.fuzz_peer import Peer
from scripts.fuzz_values import frame

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = frame(4, 0, 0, b"")
DATA, HEADERS, PRIORITY, RST_STREAM, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 2, 3, 6, 7, 8, 9
SOCKET_DEADLINE_S = 20.0
# :method POST, :scheme http and :path by static index: enough to open a stream.
OPENING_HEADERS = b"\x83\x86\x84"


def garbage(draw: random.Random) -> bytes:
    return draw.randbytes(draw.choice([1, 9, 24, 100, 5000, 70_000]))


def web(draw: random.Random) -> bytes:
    """What a browser or a scanner would ask."""
    return draw.choice([b"GET / HTTP/1.1\r\n\r\n", b"GET " + b"/" * 9000, b"HELP\n", b"\x00" * 64, b"SSH-2.0-x\r\n"])


def tls(draw: random.Random) -> bytes:
    """The beginning of a TLS handshake, with lengths that may be lies."""
    body = draw.randbytes(draw.randrange(300))
    length = len(body) if draw.random() < 0.5 else draw.randrange(65536)
    return bytes([22, 3, draw.randrange(5)]) + length.to_bytes(2, "big") + b"\x01" + body


def half(draw: random.Random) -> bytes:
    """HTTP/2 that stops in the middle of a frame."""
    whole = PREFACE + SETTINGS + frame(HEADERS, 4, 1, OPENING_HEADERS + draw.randbytes(40))
    return whole[: draw.randrange(1, len(whole))]


def lies(draw: random.Random) -> bytes:
    """Frames of any kind, flags, stream and length."""
    frames = [
        frame(
            draw.choice([*range(10), draw.randrange(256)]),
            draw.randrange(256),
            draw.choice([0, 1, 2, 3, 2**31 - 1, 2**31]),
            draw.randbytes(draw.choice([0, 4, 5, 8, 100])),
            draw.choice([None, None, 0, 2**14 + 1, 2**24 - 1]),
        )
        for _ in range(draw.randrange(1, 20))
    ]
    return PREFACE + SETTINGS + b"".join(frames)


def flood(draw: random.Random) -> bytes:
    """Many small frames: pings, settings, resets, empty continuations."""
    count = draw.choice([50, 500])
    kind = draw.randrange(5)
    if kind == 0:
        return PREFACE + SETTINGS + frame(PING, 0, 0, bytes(8)) * count
    if kind == 1:
        return PREFACE + SETTINGS * count
    if kind == 2:
        opened = (
            frame(HEADERS, 4, 2 * index + 1, OPENING_HEADERS) + frame(RST_STREAM, 0, 2 * index + 1, bytes(4))
            for index in range(count)
        )
        return PREFACE + SETTINGS + b"".join(opened)
    if kind == 3:
        return PREFACE + SETTINGS + frame(HEADERS, 0, 1, OPENING_HEADERS) + frame(CONTINUATION, 0, 1, b"") * count
    return PREFACE + SETTINGS + frame(WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff") * count


KINDS: tuple[Callable[[random.Random], bytes], ...] = (garbage, web, tls, half, lies, flood)


@contextlib.contextmanager
def connected(address: str) -> Iterator[socket.socket]:
    target = parse_address(address)
    with socket.create_connection((target.host, target.port), SOCKET_DEADLINE_S) as connection:
        yield connection


def strangers(peer: Peer) -> None:
    """A few connections at once, each with something else; some hang up, some wait; honest calls go through."""
    with contextlib.ExitStack() as open_ones:
        for _ in range(peer.draw.randrange(1, 5)):
            connection = open_ones.enter_context(connected(peer.address))
            said = peer.draw.choice(KINDS)(peer.draw)
            with contextlib.suppress(OSError):  # it may hang up on us
                connection.sendall(said)
                if peer.draw.random() < 0.3:
                    connection.shutdown(socket.SHUT_WR)
                if peer.draw.random() < 0.3:
                    connection.settimeout(0.05)
                    connection.recv(4096)
            if peer.draw.random() < 0.3:
                connection.close()
        peer.still_answers()


CASES = (strangers,)
