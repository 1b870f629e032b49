"""Attacks on the tensor stream: what is declared is not what comes, or it comes too late, twice, woven or without end.

Nothing here is ever a whole set of right outputs: what a holder may rightly hand in is no attack.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import random
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import msgpack
import numpy as np

from model import tensor_file
from protocol import dipaco_pb2 as pb
from scripts import fuzz_values as values
from scripts.fuzz_calls import NOBODY, header_of
from scripts.fuzz_peer import CLEAR, DEADLINE_S, METHODS, Finding, Held, Peer

CHUNK = 1 << 12
ENDLESS = 200
# What the client itself says of a stream that it broke off.
OWN_END = ("CANCELLED", "DEADLINE_EXCEEDED")
Tensors = dict[str, np.ndarray]


def tensors_of(held: Held) -> Tensors:
    return {name: np.zeros(shape, np.float32) for name, shape in held.shapes.items()}


def file_of(tensors: Tensors) -> bytes:
    """The tensors as they lie in a file."""
    pairs = [(name, tensor.shape) for name, tensor in tensors.items()]
    data = b"".join(np.ascontiguousarray(tensors[name], "<f4").tobytes() for name in sorted(tensors))
    return tensor_file.header_bytes(pairs) + data


def told(draw: random.Random, held: Held, data: bytes) -> dict[str, Any]:
    """The header that is right for these bytes of the first module."""
    true = {"kind": "module", "digest": hashlib.sha256(data).hexdigest(), "size": len(data)}
    return header_of(draw, held) | true


def opening(header: dict[str, Any]) -> bytes:
    return _message(header=msgpack.packb(header))


def pieces(data: bytes, size: int = CHUNK) -> Iterator[bytes]:
    yield from (_message(data=data[start : start + size]) for start in range(0, len(data), size))


def _message(**fields: bytes) -> bytes:
    packed: bytes = pb.UploadChunk(**fields).SerializeToString()
    return packed


def _refused(peer: Peer, messages: Iterator[bytes] | list[bytes], why: str) -> None:
    """Raises Finding where an upload that is not right is taken."""
    status, _ = peer.ask(METHODS["Upload"], iter(messages))
    if status == "OK":
        raise Finding(f"an upload is taken although {why}")


def _with_a_module(case: Callable[[Peer, Held], None]) -> Callable[[Peer], None]:
    """The case under a lease for which a contribution can be made up; nothing where none is to be had just now."""

    @functools.wraps(case)
    def attempt(peer: Peer) -> None:
        with peer.holding() as held:
            if held is not None and held.shapes:
                case(peer, held)

    return attempt


def headers(peer: Peer) -> None:
    """Headers of any content, in any number, in any place."""
    draw = peer.draw
    with peer.holding() as held:
        for _ in range(3):
            header = values.packed(draw, header_of(draw, held or NOBODY))
            messages = [_message(header=header, data=values.noise(draw)), *pieces(values.noise(draw, 3000), 500)]
            if draw.random() < 0.3:
                messages.insert(draw.randrange(len(messages)), _message(header=header))
            if draw.random() < 0.2:
                draw.shuffle(messages)
            peer.ask(METHODS["Upload"], messages)


@_with_a_module
def other_tensors(peer: Peer, held: Held) -> None:
    """Names, shapes and values that are not the module's."""
    draw = peer.draw
    tensors = tensors_of(held)
    name = draw.choice(sorted(tensors))
    act = draw.randrange(5)
    if act == 0:
        tensors[f"{name}x"] = tensors.pop(name)
    elif act == 1:
        tensors[name] = np.zeros((*tensors[name].shape, 1), np.float32)
    elif act == 2:
        tensors.pop(name)
    elif act == 3:
        tensors["more"] = np.zeros(draw.randrange(1, 9), np.float32)
    else:
        tensors[name].flat[draw.randrange(tensors[name].size)] = draw.choice([np.nan, np.inf, -np.inf])
    data = file_of(tensors)
    header = told(draw, held, data)
    if draw.random() < 0.5:
        header["tensors"] = [[key, "float32", list(value.shape)] for key, value in tensors.items()]
    _refused(peer, [opening(header), *pieces(data)], f"its tensors are wrong ({act})")


@_with_a_module
def other_header(peer: Peer, held: Held) -> None:
    """The right bytes under a header in which one thing is wrong."""
    draw = peer.draw
    data = file_of(tensors_of(held))
    wrongs: list[dict[str, Any]] = [
        {"size": values.number(draw)},
        {"size": len(data) + draw.choice([-1, 1])},
        {"offset": draw.choice([len(data), len(data) + 1, 2**40, 2**63 - 1, -1])},
        {"kind": draw.choice(["inner_state", "checkpoint", "record", "tokens", "MODULE", ""])},
        {"codec": draw.choice(["gzip", "", 0])},
        {"digest": values.digest(draw)},
        {"worker_id": NOBODY.worker_id},
        {"fence": held.fence + draw.choice([-1, 1, 2**40])},
        {"task_id": draw.choice(["", values.word(draw), "train/TRAIN/99/0"])},
        {"output": draw.choice(["", "inner_state", "9.9", values.word(draw)])},
        {"tensors": [[name, "float64", list(shape)] for name, shape in held.shapes.items()]},
        {"tensors": [[name, "float32", [2**40, *shape]] for name, shape in held.shapes.items()]},
        {"tensors": [[name, "float32", list(shape)] for name, shape in held.shapes.items()] * 2},
    ]
    wrong = draw.choice(wrongs)
    header = told(draw, held, data)
    if header | wrong == header:
        return
    _refused(peer, [opening(header | wrong), *pieces(data)], f"its header says {wrong}")


@_with_a_module
def other_bytes(peer: Peer, held: Held) -> None:
    """Cut short, too long, damaged, or in a wrong order, under the right header."""
    draw = peer.draw
    data = file_of(tensors_of(held))
    act = draw.randrange(5)
    if act == 0:
        sent = data[: draw.randrange(len(data))]
    elif act == 1:
        sent = data + values.noise(draw) + b"x"
    elif act == 2:
        sent = values.broken(draw, data)
    elif act == 3:
        sent = draw.randbytes(len(data))
    else:
        sent = struct.pack("<Q", draw.choice([0, 2**20, 2**63, 2**64 - 1])) + data[8:]
    if sent != data:
        _refused(peer, [opening(told(draw, held, data)), *pieces(sent, draw.randrange(1, CHUNK))], "it is damaged")


@_with_a_module
def without_end(peer: Peer, held: Held) -> None:
    """A stream that goes on and on, of chunks of any size."""
    draw = peer.draw
    header = told(draw, held, file_of(tensors_of(held)))
    chunk = _message(data=bytes(draw.choice([0, 1, CHUNK, 1 << 20, (3 << 20) + 1])))
    stream = itertools.chain([opening(header)], itertools.repeat(chunk, ENDLESS))
    _refused(peer, stream, "it goes on after its end")


@_with_a_module
def woven(peer: Peer, held: Held) -> None:
    """Several uploads of one output at once, some broken off; afterwards the right one still gets through."""
    draw = peer.draw
    data = file_of(tensors_of(held))
    right = [opening(told(draw, held, data)), *pieces(data)]
    calls = []
    for _ in range(draw.randrange(2, 5)):
        spoilt = values.broken(draw, data)[: draw.randrange(len(data))]
        header = told(draw, held, data if draw.random() < 0.5 else spoilt)
        calls.append(peer.begin(iter([opening(header), *pieces(spoilt, 1 + draw.randrange(CHUNK))])))
        if draw.random() < 0.3:
            calls[-1].cancel()
    for call in calls:
        _ended(call)
    status, _ = peer.ask(METHODS["Upload"], right)
    if status not in ("OK", "FAILED_PRECONDITION"):  # the lease may have ended meanwhile
        raise Finding(f"after woven uploads the right one is answered {status}")


@_with_a_module
def left_hanging(peer: Peer, held: Held) -> None:
    """A peer that falls silent in the middle and goes away; what it sent is continued later."""
    draw = peer.draw
    data = file_of(tensors_of(held))
    header, half = told(draw, held, data), draw.randrange(len(data))
    ended = draw.choice([0.02, 0.1])
    _ended(peer.begin(_silent_after([opening(header), *pieces(data[:half])]), deadline_s=ended))
    asked = pb.OffsetRequest(task_id=held.task_id, fence=held.fence, digest=header["digest"])
    reply = peer.say("Offset", asked)
    if reply is None:
        return
    if reply.offset > half:
        raise Finding(f"{reply.offset} bytes are said to be held after {half} were sent")
    rest = [opening(header | {"offset": reply.offset}), *pieces(data[reply.offset :])]
    status, _ = peer.ask(METHODS["Upload"], rest)
    if status not in ("OK", "FAILED_PRECONDITION"):
        raise Finding(f"an upload that was broken off at {reply.offset} cannot go on: {status}")


def _silent_after(messages: list[bytes]) -> Iterator[bytes]:
    """Yields the messages, then nothing for a moment longer than anybody listens."""
    yield from messages
    time.sleep(0.2)


def _ended(call: Any) -> None:
    """Wait for an upload; raises Finding where it hangs or its end is not clear."""
    with contextlib.suppress(grpc.FutureCancelledError):
        try:
            code = call.code()
        except grpc.FutureTimeoutError:
            raise Finding(f"an upload hangs for more than {DEADLINE_S} s") from None
        if code.name not in CLEAR and code.name not in OWN_END:
            raise Finding(f"an upload is answered {code.name}: {call.details()}")


CASES = (headers, other_tensors, other_header, other_bytes, without_end, woven, left_hanging)
