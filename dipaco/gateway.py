"""`dipaco gateway` in one process: the router of a run or an export, and its paths served elsewhere, until a signal."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from coordinator.snapshot import RunSnapshot
from corpus.tokenizer import Tokenizer
from dipaco.ending import Refused
from dipaco.export_folder import MANIFEST, read_manifest
from dipaco.run_router import open_router
from dipaco.serving import Signals, admitted, model_name, unencrypted, until_signalled
from inference.gateway import Gateway, PathIds
from inference.gateway_app import make_gateway_app
from inference.gateway_backend import Backend
from inference.gateway_choice import Choice
from inference.gateway_config import GatewayConfig, Target, read_config, targets
from inference.served_model import Limits, ServedModel
from inference.server import Doors, OpenDoors, open_http_door
from protocol.address import Address
from routing.artefact import ROUTER, RouterArtefact

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GatewayOffer:
    """What is offered, and where its paths are. None: what one sequence holds, the run's name, no bound."""

    config: Path | None = None
    backends: Sequence[str] = ()
    partial: bool = False
    name: str | None = None
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    running: int = 64
    drain_s: float | None = None


def run_gateway(place: Path, doors: Doors, offer: GatewayOffer, say: Callable[[str], None]) -> bool:
    """Forward until SIGINT or SIGTERM; False where answers were cut off at the end.

    Raises Refused, BadArtefact, BadBackend, InvalidConfig, RunUnusable, BadAddress, CannotServe before it listens.
    """
    doors.check()
    return until_signalled(lambda signals: gateway_until(signals, place, doors, offer, say))


async def gateway_until(
    signals: Signals,
    place: Path,
    doors: Doors,
    offer: GatewayOffer,
    say: Callable[[str], None],
    ready: Callable[[OpenDoors, Gateway], None] = lambda opened, gateway: None,
) -> bool:
    """The same until `signals` say so; `ready` is told the doors once they are open."""
    config = read_config(offer.config, offer.backends)
    artefact, name = open_artefact(place)
    found = targets(config, artefact.paths, os.environ, partial=offer.partial)
    gateway = _gateway(artefact, model_name(offer.name or name), found, config, offer, say)
    watching: asyncio.Task[None] | None = None
    try:
        await gateway.probe()
        opened = await open_http_door(make_gateway_app(gateway, doors.keys), gateway.admission, doors)
        watching = asyncio.create_task(_watch(gateway, config.patience.probe_s))
        for line in greeting(gateway, found, opened, doors):
            say(line)
        ready(opened, gateway)
        await signals.drain.wait()
        say(f"draining: {gateway.admission.open} requests are being answered; a second signal ends them")
        whole = await opened.stop(signals.cut, offer.drain_s)
    finally:
        if watching is not None:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        await gateway.close()
    say("all requests were answered" if whole else "requests were cut off")
    return whole


def open_artefact(place: Path) -> tuple[RouterArtefact, str]:
    """The router at a place, which is its own folder, an export that holds one, or a run; and the run's name.

    Raises Refused, BadArtefact, RunUnusable, DamagedModule, MalformedRecord.
    """
    if (place / ROUTER).is_file():
        above = read_manifest(place.resolve().parent)
        return RouterArtefact.open(place), place.resolve().name if above is None else above.run
    manifest = read_manifest(place)
    if manifest is not None:
        if manifest.router is None:
            raise Refused(f"{place} is an export without a router; export the run with --router, too")
        return RouterArtefact.open(place / manifest.router), manifest.run
    if not (place / "config.yaml").is_file():
        raise Refused(f"{place} is no router ({ROUTER}), no export ({MANIFEST}) and no run (config.yaml); name one")
    with RunSnapshot.held(place) as snapshot:
        router, topology = open_router(snapshot), snapshot.topology
        tokenizer = Tokenizer.from_file(snapshot.tokenizer_path)
        paths = tuple(topology.path_id(path_index) for path_index in range(topology.num_paths))
        return RouterArtefact(router.base, router.frozen, tokenizer, paths, {}), snapshot.config.name


def greeting(gateway: Gateway, found: Sequence[Target | None], opened: OpenDoors, doors: Doors) -> list[str]:
    """What a person needs to know once the gateway listens."""
    scheme = "http" if doors.tls is None else "https"
    up, backends = gateway.up(), [target for target in found if target is not None]
    missing = len(found) - len(backends)
    lines = [
        f"routing {gateway.model.name} ({len(found)} paths, {gateway.model.snapshot}), {admitted(doors)}",
        f"HTTP  {scheme}://{opened.http}/v1",
        *(f"path {each.path}  {each.model} at {each.url}{'' if up[each.path] else ' (down)'}" for each in backends),
    ]
    if missing:
        lines.append(f"{missing} paths have no backend: their texts go to the next best path")
    open_keys = [each.path for each in backends if each.key is not None and _is_exposed(each.url)]
    if open_keys:
        lines.append(f"the API keys of paths {', '.join(open_keys)} go over the network unencrypted: use https")
    return [*lines, *unencrypted(opened, doors)]


def _is_exposed(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme == "http" and not Address(parts.hostname or "", parts.port or 80).is_loopback


def _gateway(
    artefact: RouterArtefact,
    name: str,
    found: Sequence[Target | None],
    config: GatewayConfig,
    offer: GatewayOffer,
    say: Callable[[str], None],
) -> Gateway:
    model = ServedModel(
        name=name,
        topology=PathIds(artefact.paths),
        tokenizer=artefact.tokenizer,
        created_s=int(time.time()),
        has_router=True,
        has_router_lm=False,
        snapshot=f"router-{artefact.frozen.version[:12]}",
    )
    length = artefact.base.config.sequence_length
    limits = Limits(
        prompt_tokens=offer.prompt_tokens or length - 1, new_tokens=offer.new_tokens or length, running=offer.running
    )
    backends = [None if target is None else Backend(target, config.patience) for target in found]
    choice = Choice([target is not None for target in found], config.patience.cool_down_s)
    return Gateway(artefact, model, backends, choice, limits, say)


async def _watch(gateway: Gateway, probe_s: float) -> None:
    """Look at the backends again and again."""
    while True:
        await asyncio.sleep(probe_s)
        try:
            await gateway.probe()
        except Exception:
            logger.exception("a look at the backends failed")
