"""Opens the doors of a server of texts, HTTP and gRPC, in one event loop, and drains them before they close.

Off loopback an API key is needed unless the caller insists; TLS is one certificate for both doors.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import uvicorn
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from starlette.applications import Starlette

from inference.admission import Admission
from inference.answering import Answering
from inference.api_keys import ApiKeys
from inference.http_app import make_app
from inference.service import GenerationService
from protocol import inference_pb2 as pb
from protocol import inference_pb2_grpc as pb_grpc
from protocol.address import Address, parse_address
from protocol.interceptors import ErrorInterceptor

logger = logging.getLogger(__name__)

_BACKLOG = 1024
_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.server_handshake_timeout_ms", 20_000),
)
_CUT_OFF_S = 2.0  # for answers that were cut off to be sent


class CannotServe(ValueError):
    """An address that may not or cannot be listened at, or files of TLS that are none."""


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files of the certificate (with its chain) and its key."""

    certificate: Path
    key: Path

    def check(self) -> None:
        """Raises CannotServe where the two are not a certificate and its key."""
        import ssl

        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as error:
            raise CannotServe(
                f"{self.certificate} and {self.key} are not a certificate and its key in PEM: {error}"
            ) from None


@dataclass(frozen=True, slots=True)
class Doors:
    """Where to listen, port 0 taking a free one, and who may come in. Without `grpc` there is no gRPC door."""

    http: str
    grpc: str | None = None
    keys: ApiKeys | None = None
    tls: Tls | None = None
    insecure: bool = False

    def check(self) -> tuple[Address, Address | None]:
        """The addresses; raises BadAddress, CannotServe."""
        if self.tls is not None:
            self.tls.check()
        http, other = parse_address(self.http), None if self.grpc is None else parse_address(self.grpc)
        for address in (http, other):
            if address is not None and not (address.is_loopback or self.keys or self.insecure):
                raise CannotServe(
                    f"{address} is reachable from other machines and no API key is asked for; give --api-key-file, "
                    "listen on 127.0.0.1, or pass --insecure on a network you trust"
                )
        return http, other


class _Uvicorn(uvicorn.Server):
    """Signals are the caller's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class OpenDoors:
    """A server that listens at `http` and `grpc`; their ports are the real ones."""

    def __init__(self, admission: Admission, http: Address, grpc_address: Address | None) -> None:
        self.http, self.grpc = http, grpc_address
        self._admission = admission
        self._http_server: _Uvicorn | None = None
        self._serving: asyncio.Task[None] | None = None
        self._grpc_server: Any = None
        self._health: Any = None

    async def stop(self, cut: asyncio.Event, drain_s: float | None = None) -> bool:
        """Take nothing new, let what is being answered end, and close.

        False where answers were cut off: `cut` was set, or `drain_s` seconds were over.
        """
        self._admission.drain()
        if self._health is not None:
            await self._health.enter_graceful_shutdown()
        idle, told = asyncio.create_task(self._admission.until_idle()), asyncio.create_task(cut.wait())
        await asyncio.wait({idle, told}, timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
        whole = idle.done()
        for task in (idle, told):
            task.cancel()
        await self._close(whole)
        return whole

    async def _close(self, whole: bool) -> None:
        if self._grpc_server is not None:
            await self._grpc_server.stop(_CUT_OFF_S if whole else 0)
        assert self._http_server is not None
        assert self._serving is not None
        self._http_server.should_exit = True
        if not whole:
            self._http_server.force_exit = True
        await self._serving

    async def _open_http(self, doors: Doors, app: Starlette) -> None:
        bound = _bound(self.http)
        self.http = Address(self.http.host, bound.getsockname()[1])
        tls = doors.tls
        config = uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(_CUT_OFF_S),
            ssl_certfile=None if tls is None else tls.certificate,
            ssl_keyfile=None if tls is None else tls.key,
        )
        self._http_server = _Uvicorn(config)
        self._serving = asyncio.create_task(self._http_server.serve(sockets=[bound]))
        while not self._http_server.started:
            if self._serving.done():
                self._serving.result()
                raise CannotServe(f"the HTTP server at {self.http} did not start")
            await asyncio.sleep(0.01)

    async def _open_grpc(self, doors: Doors, address: Address, answering: Answering) -> None:
        server = grpc.aio.server(interceptors=[ErrorInterceptor()], options=_OPTIONS)
        pb_grpc.add_GenerationServicer_to_server(GenerationService(answering, doors.keys), server)
        services = [service.full_name for service in pb.DESCRIPTOR.services_by_name.values()]
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined, unused-ignore]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        for service in ("", *services):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        reflection.enable_server_reflection((*services, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        self.grpc = Address(address.host, _grpc_port(server, address, doors.tls))
        await server.start()
        self._grpc_server = server


async def open_doors(answering: Answering, doors: Doors) -> OpenDoors:
    """Listen; raises BadAddress, CannotServe."""
    http, grpc_address = doors.check()
    opened = OpenDoors(answering.admission, http, grpc_address)
    await opened._open_http(doors, make_app(answering, doors.keys))
    try:
        if grpc_address is not None:
            await opened._open_grpc(doors, grpc_address, answering)
    except BaseException:
        await opened._close(whole=False)
        raise
    return opened


async def open_http_door(app: Starlette, admission: Admission, doors: Doors) -> OpenDoors:
    """Listen with another application, over HTTP alone; raises BadAddress, CannotServe."""
    http, _ = doors.check()
    opened = OpenDoors(admission, http, None)
    await opened._open_http(doors, app)
    return opened


def _bound(address: Address) -> socket.socket:
    """A listening socket; raises CannotServe."""
    try:
        family, kind, number, _, place = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, number)
    except OSError as error:
        raise CannotServe(f"cannot listen at {address}: {error.strerror or error}") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(place)
        bound.listen(_BACKLOG)
    except OSError as error:
        bound.close()
        raise CannotServe(f"cannot listen at {address}: {error.strerror or error}") from None
    return bound


def _grpc_port(server: Any, address: Address, tls: Tls | None) -> int:
    """Bind the address; returns the port. Raises CannotServe."""
    try:
        if tls is None:
            port = int(server.add_insecure_port(str(address)))
        else:
            pair = (tls.key.read_bytes(), tls.certificate.read_bytes())
            port = int(server.add_secure_port(str(address), grpc.ssl_server_credentials([pair])))
    except RuntimeError:
        port = 0
    if port == 0:
        raise CannotServe(f"cannot listen at {address}: the port is taken or the host is not one of this machine's")
    return port
