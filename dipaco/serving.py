"""`dipaco serve` in one process: the run is followed, the engine computes, the doors are open until a signal."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coordinator.state import Version
from dipaco.ending import Refused
from dipaco.followed_run import FollowedRun, Taken, followed
from dipaco.following import Following
from inference.answering import Answering
from inference.batch_engine import BatchEngine, BatchLimits
from inference.metrics import ServerMetrics
from inference.served_model import Limits, ServedModel
from inference.server import Doors, OpenDoors, open_doors
from inference.stream import Reading

LOOK_S = 3.0


@dataclass(frozen=True, slots=True)
class Offer:
    """What is served and how much of it. `prompt_tokens`, `new_tokens` None: what one sequence holds.

    `memory_bytes` bounds the modules in memory; `drain_s` (None: no bound) the wait for open answers at the end.
    """

    name: str | None = None
    version: Version = "last"
    memory_bytes: int = 2 * 1024**3
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    running: int = 16
    waiting: int = 64
    drain_s: float | None = None
    look_s: float = LOOK_S


@dataclass
class Signals:
    """What a person wants of the server: `drain` at the first signal, `cut` at the second."""

    drain: asyncio.Event = field(default_factory=asyncio.Event)
    cut: asyncio.Event = field(default_factory=asyncio.Event)

    def hear(self) -> None:
        """A signal came."""
        if self.drain.is_set():
            self.cut.set()
        self.drain.set()


def serve_run(run_dir: Path, doors: Doors, offer: Offer, say: Callable[[str], None]) -> bool:
    """Serve until SIGINT or SIGTERM; False where answers were cut off at the end.

    Raises RunUnusable, Refused, DamagedModule, BadAddress, CannotServe before it listens.
    """
    doors.check()

    return until_signalled(lambda signals: serve_until(signals, run_dir, doors, offer, say))


def until_signalled(serve: Callable[[Signals], Coroutine[Any, Any, bool]]) -> bool:
    """What `serve` returns, which hears of SIGINT and SIGTERM."""

    async def served() -> bool:
        signals = Signals()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, signals.hear)
        return await serve(signals)

    return asyncio.run(served())


async def serve_until(
    signals: Signals,
    run_dir: Path,
    doors: Doors,
    offer: Offer,
    say: Callable[[str], None],
    ready: Callable[[OpenDoors], None] = lambda opened: None,
) -> bool:
    """The same until `signals` say so; `ready` is told the doors once they are open."""
    with followed(run_dir, offer.version, offer.memory_bytes, say) as run:
        taken = run.take()
        assert taken is not None
        model, limits = _model(run, taken, offer), _limits(run, offer)
        engine = _engine(run, taken, limits)
        del taken  # the engine holds its paths, and nobody else
        metrics = ServerMetrics()
        answering = Answering(engine, model, limits, metrics)
        metrics.follow(engine.stats, lambda: answering.open_answers)
        following: Following | None = None
        whole = False
        try:
            opened = await open_doors(answering, doors)
            following = Following(run, engine, answering, offer.look_s, say)
            for line in greeting(model, opened, doors):
                say(line)
            ready(opened)
            await signals.drain.wait()
            say(f"draining: {answering.open_answers} requests are being answered; a second signal ends them")
            whole = await opened.stop(signals.cut, offer.drain_s)
        finally:
            if following is not None:
                await following.stop()
            await asyncio.to_thread(engine.close, whole)
        say("all requests were answered" if whole else "requests were cut off")
        return whole


def greeting(model: ServedModel, opened: OpenDoors, doors: Doors) -> list[str]:
    """What a person needs to know once the server listens."""
    scheme = "http" if doors.tls is None else "https"
    lines = [
        f"serving {model.name} ({model.topology.num_paths} paths, {model.snapshot}), {admitted(doors)}",
        f"HTTP  {scheme}://{opened.http}/v1",
    ]
    if opened.grpc is not None:
        lines.append(f"gRPC  {opened.grpc} (dipaco.inference.v1.Generation)")
    return [*lines, *unencrypted(opened, doors)]


def unencrypted(opened: OpenDoors, doors: Doors) -> list[str]:
    """The warning that a door beyond this machine deserves without TLS."""
    exposed = [str(address) for address in (opened.http, opened.grpc) if address and not address.is_loopback]
    if not exposed or doors.tls is not None:
        return []
    return [f"traffic to {' and '.join(exposed)} is not encrypted: give --tls-cert and --tls-key"]


def admitted(doors: Doors) -> str:
    """Who may come in."""
    return "for anyone who reaches it" if doors.keys is None else "for those with an API key"


def _model(run: FollowedRun, taken: Taken, offer: Offer) -> ServedModel:
    return ServedModel(
        name=model_name(offer.name or run.first.config.name),
        topology=run.topology,
        tokenizer=run.tokenizer,
        created_s=int(time.time()),
        has_router=taken.has_router,
        has_router_lm=taken.router_lm is not None,
        snapshot=taken.name,
    )


def model_name(name: str) -> str:
    """The name itself; raises Refused where it cannot be a model's."""
    if not name or "/" in name or not name.isprintable():
        raise Refused(f"the name {name!r} cannot be a model's: printable characters without /, please; give --name")
    return name


def _limits(run: FollowedRun, offer: Offer) -> Limits:
    length = run.first.config.experiment.model.sequence_length
    return Limits(
        prompt_tokens=offer.prompt_tokens or length - 1,
        new_tokens=offer.new_tokens or length,
        running=offer.running,
        waiting=offer.waiting,
    )


def _engine(run: FollowedRun, taken: Taken, limits: Limits) -> BatchEngine:
    prefix_tokens = run.first.config.experiment.sharding.prefix_tokens
    return BatchEngine(
        taken.paths,
        taken.router,
        Reading(prefix_tokens, run.tokenizer.bos_id, run.tokenizer.eos_id),
        router_lm=taken.router_lm,
        limits=BatchLimits(running=limits.running, waiting=limits.waiting),
    )
