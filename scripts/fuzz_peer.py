"""A peer that means no good: it speaks raw bytes to every call of the protocol, and judges the answers.

What there is to call is read from the descriptor of the .proto, so that a new call is attacked without being named
here. An answer counts as clear where its status stands in the table of protocol.errors and is not a failure.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import message_factory

from model import tensor_file
from protocol import dipaco_pb2 as pb
from protocol.errors import STATUS_OF
from protocol.tasks import Capabilities, TrainSpec, decode_spec, encode
from protocol.version import PROTOCOL_MAJOR
from worker.probe import fingerprint

CLEAR = {"OK", *STATUS_OF.values()} - {"INTERNAL", "UNAVAILABLE"}
# A call that takes longer hangs. Generous, since the machine may be busy.
DEADLINE_S = 60.0
# How long a stranger waits for a task it may do mischief with.
LEASE_WAIT_S = 0.2
REMEMBERED = 40
CAPABILITIES = Capabilities(devices=["cpu"], memory_bytes=1 << 40, threads=64, fingerprint=fingerprint("cpu"))


class Finding(Exception):
    """What a case has found."""


@dataclass(frozen=True, slots=True)
class Method:
    """One call of the protocol; `request` is the class of its messages."""

    path: str
    name: str
    request: Any
    shape: str

    @classmethod
    def all(cls) -> list[Method]:
        """Every call of every service of the .proto."""
        return [
            cls(
                f"/{service.full_name}/{method.name}",
                method.name,
                message_factory.GetMessageClass(method.input_type),
                f"{'stream' if method.client_streaming else 'unary'}_"
                f"{'stream' if method.server_streaming else 'unary'}",
            )
            for service in pb.DESCRIPTOR.services_by_name.values()
            for method in service.methods
        ]


METHODS = {method.name: method for method in Method.all()}


@dataclass(frozen=True, slots=True)
class Held:
    """A live lease of the stranger. `shapes`: the tensors of the first module of its path, empty for other tasks."""

    worker_id: str
    task_id: str
    fence: int
    output: str = ""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


class Peer:
    """One stranger with a channel and a token-free loopback address; `draw` decides everything it does in a case."""

    def __init__(self, address: str, run_dir: Path) -> None:
        self.address = address
        self.draw = random.Random(0)
        self.answers: Counter[str] = Counter()
        self.tasks: list[str] = []
        self.digests: list[str] = []
        self.worker_id = ""
        self._blobs = run_dir / "blobs"
        self._channel = grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])

    def close(self) -> None:
        self._channel.close()

    # --- calls ------------------------------------------------------------------------------------------------------

    def ask(
        self,
        method: Method,
        messages: Iterable[bytes],
        *,
        allowed: Sequence[str] = (),
        deadline_s: float = DEADLINE_S,
    ) -> tuple[str, list[bytes]]:
        """Status and replies of a call; raises Finding where the status is not clear (nor in `allowed`)."""
        call = getattr(self._channel, method.shape)(method.path)
        sent: Any = iter(messages) if method.shape.startswith("stream") else next(iter(messages), b"")
        replies: list[bytes] = []
        status, details = "OK", ""
        try:
            answer = call(sent, timeout=deadline_s)
            replies = list(answer) if method.shape.endswith("stream") else [answer]
        except grpc.RpcError as error:
            status, details = error.code().name, str(error.details())
        self.answers[f"{method.name} {status}"] += 1
        if status not in CLEAR and status not in allowed:
            raise Finding(f"{method.name} is answered {status}: {details[:300]}")
        return status, replies

    def say(self, name: str, request: Any, **more: Any) -> Any:
        """One well-formed unary call; the parsed reply, None where it was refused."""
        status, replies = self.ask(METHODS[name], [request.SerializeToString()], **more)
        return None if status != "OK" or not replies else getattr(pb, f"{name}Reply").FromString(replies[0])

    def begin(self, messages: Iterator[bytes], deadline_s: float = DEADLINE_S) -> Any:
        """An upload under way: its future, so that several can be woven together and broken off."""
        call: Any = getattr(self._channel, METHODS["Upload"].shape)(METHODS["Upload"].path)
        return call.future(messages, timeout=deadline_s)

    def still_answers(self) -> None:
        """Raises Finding where the coordinator does not answer an honest question."""
        status, _ = self.ask(METHODS["Status"], [b""], allowed=[])
        if status != "OK":
            raise Finding(f"an honest Status is answered {status}")

    # --- being part of the run --------------------------------------------------------------------------------------

    @contextmanager
    def joined(self) -> Iterator[str]:
        """A worker of the run for one case; whatever it holds is given back at the end."""
        request = pb.HelloRequest(
            protocol_major=PROTOCOL_MAJOR, worker_name="stranger", capabilities=encode(CAPABILITIES)
        )
        reply = self.say("Hello", request)
        if reply is None:
            raise Finding("an honest Hello is refused")
        self.worker_id = reply.worker_id
        try:
            yield self.worker_id
        finally:
            self.say("Release", pb.ReleaseRequest(worker_id=self.worker_id, leaving=True))
            self.worker_id = ""

    @contextmanager
    def holding(self) -> Iterator[Held | None]:
        """The lease of some task, or None where there is none to be had just now."""
        with self.joined() as worker_id:
            request = pb.LeaseRequest(worker_id=worker_id, wait_s=LEASE_WAIT_S)
            reply = self.say("Lease", request)
            if reply is None or not reply.task_id:
                yield None
                return
            self.tasks = [*self.tasks[1 - REMEMBERED :], reply.task_id]
            yield self._held(reply, worker_id)

    def _held(self, reply: Any, worker_id: str) -> Held:
        spec = decode_spec(reply.spec)
        if not isinstance(spec, TrainSpec):
            return Held(worker_id, reply.task_id, reply.fence, "tokens")
        modules = spec.path.modules
        self.digests = [*self.digests[3 - REMEMBERED :], *(module.blob.digest for module in modules)]
        try:
            shapes = tensor_file.shapes(self._blobs / modules[0].blob.digest)
        except OSError:  # the run has gone on meanwhile
            shapes = {}
        return Held(worker_id, reply.task_id, reply.fence, modules[0].module_id, shapes)


class Strangers:
    """Several peers at once, each in a thread, who share out the cases of a seed."""

    def __init__(self, count: int, make: Callable[[], Peer], case: Callable[[Peer, int], None]) -> None:
        self._make, self._case = make, case
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._next, self.done, self.most = 0, 0, 0
        self.findings: list[dict[str, Any]] = []
        self.answers: Counter[str] = Counter()
        self.threads = [threading.Thread(target=self._work, name=f"stranger-{index}") for index in range(count)]

    def start(self, first: int, most: int) -> None:
        """Begin with the case of this number; end after so many."""
        self._next, self.most = first, first + most
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        """Every peer ends with the case it is at."""
        self._stopped.set()
        for thread in self.threads:
            thread.join()

    @property
    def working(self) -> bool:
        return any(thread.is_alive() for thread in self.threads)

    def _work(self) -> None:
        peer = self._make()
        try:
            while (number := self._take()) is not None:
                self._one(peer, number)
        finally:
            with self._lock:
                self.answers += peer.answers
            peer.close()

    def _take(self) -> int | None:
        with self._lock:
            if self._stopped.is_set() or self._next >= self.most:
                return None
            self._next += 1
            return self._next - 1

    def _one(self, peer: Peer, number: int) -> None:
        try:
            self._case(peer, number)
        except Finding as finding:
            with self._lock:
                self.findings.append({"case": number, "what": str(finding)})
        with self._lock:
            self.done += 1
