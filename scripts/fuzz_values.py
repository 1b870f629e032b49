"""Values that nobody should send, drawn from a seed: numbers, words, msgpack, messages and their broken bytes."""

from __future__ import annotations

import math
import random
import struct
from typing import Any

import msgpack

NUMBERS = (0, 1, 2, 3, 127, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**48, 2**62, 2**63 - 1)
FLOATS = (0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324, 0.3)
WORDS = (
    "",
    "0",
    "0.0",
    "/",
    "..",
    "../../etc/passwd",
    "a\x00b",
    "\u202e",
    "é" * 30,
    "%s%n",
    "x" * 300,
    "{}",
    "\n\r",
    "w0",
)
HEX = "0123456789abcdef"
# Valid msgpack that says too much: lengths far beyond the message, deep nests, extension types.
BOMBS = (
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff",
    b"\x91" * 2000,
    b"\x81\xa1a" * 2000,
    b"\x91" * 200_000,
    b"\xc9\xff\xff\xff\xff\x01",
    b"\xd6\xff\x00\x00\x00\x00",
    b"\xc1",
)


def number(draw: random.Random) -> int:
    return draw.choice(NUMBERS) if draw.random() < 0.7 else draw.getrandbits(draw.randrange(1, 64))


def word(draw: random.Random) -> str:
    if draw.random() < 0.5:
        return draw.choice(WORDS)
    return "".join(
        chr(draw.choice((draw.randrange(32, 127), draw.randrange(1, 0xD800)))) for _ in range(draw.randrange(40))
    )


def digest(draw: random.Random) -> str:
    """What looks like the SHA-256 of a blob, mostly."""
    length = 64 if draw.random() < 0.8 else draw.randrange(130)
    return "".join(draw.choice(HEX) for _ in range(length))


def noise(draw: random.Random, most: int = 200) -> bytes:
    return draw.randbytes(draw.randrange(most))


def plain(draw: random.Random, depth: int = 0) -> Any:
    """Any value that msgpack has a form for."""
    kind = draw.randrange(9 if depth < 4 else 7)
    if kind == 0:
        return None
    if kind == 1:
        return draw.random() < 0.5
    if kind == 2:
        return number(draw)
    if kind == 3:
        return -number(draw)
    if kind == 4:
        return draw.choice(FLOATS)
    if kind == 5:
        return word(draw)
    if kind == 6:
        return noise(draw, 30)
    if kind == 7:
        return [plain(draw, depth + 1) for _ in range(draw.randrange(5))]
    return {word(draw): plain(draw, depth + 1) for _ in range(draw.randrange(5))}


def packb(value: Any) -> bytes:
    data: bytes = msgpack.packb(value)
    return data


def packed(draw: random.Random, likely: Any = None) -> bytes:
    """msgpack of `likely` with something changed in it, of anything at all, or what only looks like msgpack."""
    choice = draw.random()
    if likely is not None and choice < 0.6:
        return packb(changed(draw, likely)) if choice < 0.45 else broken(draw, packb(likely))
    if choice < 0.8:
        return packb(plain(draw))
    return draw.choice(BOMBS) if choice < 0.9 else noise(draw)


def changed(draw: random.Random, value: Any) -> Any:
    """The value with one part replaced, left out or added, somewhere in its depth."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(sorted(value))
        act = draw.randrange(4)
        if act == 0:
            return {k: v for k, v in value.items() if k != key}
        if act == 1:
            return value | {word(draw): plain(draw)}
        return value | {key: changed(draw, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.85:
        index = draw.randrange(len(value))
        act = draw.randrange(4)
        if act == 0:
            return value[:index] + value[index + 1 :]
        if act == 1:
            return [*value, value[index]]
        return [*value[:index], changed(draw, value[index]), *value[index + 1 :]]
    return plain(draw)


def broken(draw: random.Random, data: bytes) -> bytes:
    """The bytes with a few of them flipped, cut off, repeated or put in."""
    out = bytearray(data)
    for _ in range(draw.randrange(1, 5)):
        at = draw.randrange(len(out) + 1)
        act = draw.randrange(4)
        if act == 0 and at < len(out):
            out[at] ^= 1 << draw.randrange(8)
        elif act == 1:
            del out[at : at + draw.randrange(20)]
        elif act == 2:
            out[at:at] = draw.randbytes(draw.randrange(8))
        else:
            out[at:at] = out[at : at + draw.randrange(40)]
    return bytes(out)


def frame(kind: int, flags: int, stream: int, payload: bytes, length: int | None = None) -> bytes:
    """An HTTP/2 frame, whose length may be a lie."""
    size = len(payload) if length is None else length
    return struct.pack(">I", size)[1:] + struct.pack(">BBI", kind & 255, flags & 255, stream & 0xFFFFFFFF) + payload
