"""Attacks on the calls: bytes that are no message, messages with fields of any content, right messages out of turn."""

from __future__ import annotations

import random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from protocol import dipaco_pb2 as pb
from protocol.tasks import BlobRef, TaskResult, encode
from scripts import fuzz_values as values
from scripts.fuzz_peer import CAPABILITIES, METHODS, Finding, Held, Method, Peer

NOBODY = Held("w000000000000", "train/TRAIN/9/9", 1)
# gRPC itself says so where a message is larger than it takes, and for calls that there are none of.
OF_GRPC = ("RESOURCE_EXHAUSTED", "UNIMPLEMENTED")
_INTEGERS = {
    FieldDescriptor.TYPE_UINT32: 2**32,
    FieldDescriptor.TYPE_UINT64: 2**64,
    FieldDescriptor.TYPE_INT32: 2**31,
    FieldDescriptor.TYPE_INT64: 2**63,
}


def result_of(draw: random.Random) -> dict[str, Any]:
    """What a worker might hand in; its outputs were never uploaded."""
    blob = {"digest": values.digest(draw), "size": values.number(draw)}
    outputs = dict.fromkeys(draw.sample(["0.0", "0.1", "1.0", "inner_state", "tokens"], draw.randrange(5)), blob)
    return {"outputs": outputs, "steps": 2, "tokens": 40, "loss_sum": 3.5, "step_losses": [1.0, 2.0], "seconds": 0.1}


def checkpoint_of(draw: random.Random) -> dict[str, Any]:
    """What a worker might keep of a task it has begun; its blob was never uploaded."""
    blob = {"digest": values.digest(draw), "size": values.number(draw)}
    sums = {"steps": 1, "tokens": 20, "sequences": 2, "loss_sum": 1.5, "step_losses": [1.5], "seconds": 0.1}
    return {"blob": blob, **sums}


def header_of(draw: random.Random, held: Held) -> dict[str, Any]:
    """The header of an upload as its holder would send it."""
    size = 8 + 4 * sum(_elements(shape) for shape in held.shapes.values())
    return {
        "worker_id": held.worker_id,
        "task_id": held.task_id,
        "fence": held.fence,
        "output": held.output or "0.0",
        "kind": draw.choice(["module", "module", "inner_state", "checkpoint", "record", "tokens"]),
        "codec": "raw",
        "tensors": [[name, "float32", list(shape)] for name, shape in held.shapes.items()],
        "digest": values.digest(draw),
        "size": size,
        "offset": 0,
    }


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def filled(draw: random.Random, kind: Any, peer: Peer, held: Held) -> Message:
    """A message of this class whose fields are likely, unlikely or missing, whatever they are called."""
    message: Message = kind()
    for each in message.DESCRIPTOR.fields:
        if draw.random() < 0.1:
            continue
        if each.is_repeated:
            getattr(message, each.name).extend(_value(draw, each, peer, held) for _ in range(draw.randrange(5)))
        elif each.type == FieldDescriptor.TYPE_MESSAGE:
            getattr(message, each.name).CopyFrom(filled(draw, type(getattr(message, each.name)), peer, held))
        else:
            setattr(message, each.name, _value(draw, each, peer, held))
    return _harmless(message, peer)


def _value(draw: random.Random, each: Any, peer: Peer, held: Held) -> Any:
    if each.type in _INTEGERS:
        likely = [held.fence, held.fence - 1, held.fence + 1] if each.name == "fence" else []
        drawn = draw.choice(likely) if likely and draw.random() < 0.6 else values.number(draw)
        return max(0, drawn) % _INTEGERS[each.type]
    if each.type in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT):
        return draw.choice(values.FLOATS)
    if each.type == FieldDescriptor.TYPE_BOOL:
        return draw.random() < 0.5
    if each.type == FieldDescriptor.TYPE_BYTES:
        return _bytes(draw, each.name, held)
    return _word(draw, each.name, peer, held)


def _bytes(draw: random.Random, name: str, held: Held) -> bytes:
    likely: dict[str, Any] = {
        "capabilities": CAPABILITIES.model_dump(mode="json"),
        "result": result_of(draw),
        "checkpoint": checkpoint_of(draw),
        "header": header_of(draw, held),
    }
    return values.packed(draw, likely.get(name))


def _word(draw: random.Random, name: str, peer: Peer, held: Held) -> str:
    likely = {
        "worker_id": [held.worker_id, NOBODY.worker_id],
        "task_id": [held.task_id, *peer.tasks],
        "digest": peer.digests,
        "cached_digests": peer.digests,
    }.get(name)
    if likely and draw.random() < 0.6:
        return draw.choice(likely)
    return values.digest(draw) if "digest" in name and draw.random() < 0.7 else values.word(draw)


def _harmless(message: Any, peer: Peer) -> Message:
    """A holder may give a task up for a reason, and enough of them pause a run: that is no attack, but a right."""
    if isinstance(message, pb.ReleaseRequest) and message.task_id in peer.tasks:
        message.reason = ""
    assert isinstance(message, Message)
    return message


def _send(peer: Peer, method: Method, messages: list[bytes]) -> None:
    """Any clear answer will do. A Lease may wait for a task, so that its peer gives up first; a task is given back."""
    if method.name != "Lease":
        peer.ask(method, messages, allowed=OF_GRPC[:1])
        return
    _, replies = peer.ask(method, messages, allowed=("DEADLINE_EXCEEDED",), deadline_s=0.5)
    for reply in map(pb.LeaseReply.FromString, replies):
        worker_id = pb.LeaseRequest.FromString(messages[0]).worker_id
        peer.say("Release", pb.ReleaseRequest(worker_id=worker_id, task_id=reply.task_id, fence=reply.fence))


def no_message(peer: Peer) -> None:
    """Bytes of any kind for any call."""
    method = peer.draw.choice(list(METHODS.values()))
    _send(peer, method, [values.noise(peer.draw, 400) for _ in range(peer.draw.randrange(1, 4))])


def too_large(peer: Peer) -> None:
    """Bytes beyond, or just below, what one message may hold."""
    method = peer.draw.choice(list(METHODS.values()))
    size = peer.draw.choice([1 << 20, (4 << 20) - 100, (4 << 20) + 100, 5 << 20])
    _send(peer, method, [bytes([peer.draw.randrange(256)]) * size])


def any_fields(peer: Peer) -> None:
    """Well-formed messages with any content, from one who holds no task."""
    method = peer.draw.choice(list(METHODS.values()))
    for _ in range(3):
        messages = [filled(peer.draw, method.request, peer, NOBODY) for _ in range(peer.draw.randrange(1, 4))]
        _send(peer, method, [message.SerializeToString() for message in messages])


def broken_fields(peer: Peer) -> None:
    """The bytes of such messages, damaged."""
    method = peer.draw.choice(list(METHODS.values()))
    for _ in range(3):
        whole = filled(peer.draw, method.request, peer, NOBODY).SerializeToString()
        _send(peer, method, [values.broken(peer.draw, whole)])


def fields_of_a_holder(peer: Peer) -> None:
    """The same from one who does hold a task, so that more of it is right."""
    with peer.holding() as held:
        for _ in range(4):
            method = peer.draw.choice([each for each in METHODS.values() if each.name != "Hello"])
            message = filled(peer.draw, method.request, peer, held or NOBODY)
            _send(peer, method, [message.SerializeToString()])


def no_such_call(peer: Peer) -> None:
    """Calls of services and methods that there are none of."""
    name = peer.draw.choice(["", "Complete2", "../Lease", "x" * 200])
    service = peer.draw.choice(["dipaco.v1.Coordinator", "dipaco.v2.Coordinator", "x"])
    method = Method(f"/{service}/{name}", "(none)", None, "unary_unary")
    status, _ = peer.ask(method, [values.noise(peer.draw)], allowed=OF_GRPC)
    if status != "UNIMPLEMENTED":
        raise Finding(f"{method.path} is answered {status}")


def out_of_turn(peer: Peer) -> None:
    """Right messages at the wrong time, in any order, of a lease that is live, stale, foreign or over."""
    draw = peer.draw
    with peer.holding() as live:
        if live is None:
            return
        stale = Held(live.worker_id, live.task_id, max(0, live.fence - 1))
        foreign = Held(NOBODY.worker_id, live.task_id, live.fence)
        swapped = Held(live.worker_id, draw.choice(peer.tasks), live.fence)
        for _ in range(draw.randrange(3, 9)):
            which = draw.choice([live, live, stale, foreign, swapped, NOBODY])
            step = draw.choice(["Complete", "Heartbeat", "Release", "Lease", "Offset", "Hello"])
            if step == "Complete":
                _complete(peer, which)
            elif step == "Heartbeat":
                beat = pb.HeartbeatRequest(worker_id=which.worker_id, task_id=which.task_id, fence=which.fence, steps=1)
                reply = peer.say(step, beat)
                if reply is not None and not reply.lost and which in (stale, foreign, NOBODY):
                    raise Finding(f"a heartbeat of {which} is not told that the lease is lost; held: {live}")
            elif step == "Release":
                peer.say(step, pb.ReleaseRequest(worker_id=which.worker_id, task_id=which.task_id, fence=which.fence))
            elif step == "Lease":
                peer.say(step, pb.LeaseRequest(worker_id=live.worker_id, wait_s=0.0))
            elif step == "Offset":
                peer.say(step, pb.OffsetRequest(task_id=which.task_id, fence=which.fence, digest=values.digest(draw)))
            else:
                hello = filled(draw, pb.HelloRequest, peer, NOBODY)
                peer.ask(METHODS[step], [hello.SerializeToString()])


def _complete(peer: Peer, which: Held) -> None:
    outputs = {"0.0": BlobRef(digest="0" * 64, size=8)} if peer.draw.random() < 0.5 else {}
    request = pb.CompleteRequest(
        worker_id=which.worker_id,
        task_id=which.task_id,
        fence=which.fence,
        result=encode(TaskResult(outputs=outputs, steps=2)),
    )
    reply = peer.say("Complete", request)
    if reply is not None and not reply.duplicate:
        raise Finding(f"a result without outputs counts ({which})")


def broken_off(peer: Peer) -> None:
    """A transfer that its peer leaves after the first bytes, or before."""
    if not peer.digests:
        any_fields(peer)
        return
    request = pb.FetchRequest(digest=peer.draw.choice(peer.digests), offset=peer.draw.choice([0, 0, 1, 2**40]))
    wait_s = peer.draw.choice([0.001, 0.01, 5.0])
    peer.ask(METHODS["Fetch"], [request.SerializeToString()], allowed=("DEADLINE_EXCEEDED",), deadline_s=wait_s)


CASES = (no_message, too_large, any_fields, broken_fields, fields_of_a_holder, no_such_call, out_of_turn, broken_off)
