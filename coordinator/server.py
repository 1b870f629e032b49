"""Starts and stops the coordinator's gRPC server: the two services, health, reflection, and who may listen how.

With certificates traffic is TLS and every call needs the run's token, and where the run requires it a certificate of
the worker's own (gRPC for Python can require one or not ask for it, nothing between). Without them only loopback is
served, unless the caller insists. No message limit is raised.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from coordinator.descriptors import MAX_STREAMS, max_connections, raise_open_files
from coordinator.handlers import Handlers
from coordinator.service import BlobService, CoordinatorService
from protocol import dipaco_pb2 as pb
from protocol import dipaco_pb2_grpc as pb_grpc
from protocol.address import Address, parse_address
from protocol.interceptors import AdmissionInterceptor, ErrorInterceptor
from protocol.security import Gate, ServerSecurity
from protocol.tensors import DEFAULT_CHUNK_BYTES, MAX_CHUNK_BYTES

logger = logging.getLogger(__name__)

_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.so_reuseport", 0),  # a second server on the port is refused instead of taking half of the calls
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.server_handshake_timeout_ms", 20_000),  # a connection that says nothing goes again
    ("grpc.max_connection_idle_ms", 600_000),
    ("grpc.max_concurrent_streams", MAX_STREAMS),
)


class CannotListen(ValueError):
    """An address that the server may not or cannot listen at."""


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that answers at `address` (its port is the real one); `secure`: TLS and token."""

    address: Address
    secure: bool
    _server: Any
    _health: Any

    async def stop(self, grace_s: float = 2.0) -> None:
        """Say NOT_SERVING, take no new calls, give running ones `grace_s` seconds, then end them."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)

    async def wait(self) -> None:
        """Return when the server has stopped."""
        await self._server.wait_for_termination()


async def start_server(
    handlers: Handlers,
    listen: str,
    *,
    security: ServerSecurity | None = None,
    insecure: bool = False,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> RunningServer:
    """Listen at HOST:PORT (port 0: any free one) and serve `handlers`.

    Raises BadAddress, and CannotListen where the port is taken or plain traffic would leave the machine unasked.
    """
    assert 0 < chunk_bytes <= MAX_CHUNK_BYTES
    address = check_listen(listen, security, insecure)
    interceptors = [ErrorInterceptor(), *([AdmissionInterceptor(Gate(security))] if security else [])]
    bound = ("grpc.max_allowed_incoming_connections", max_connections(raise_open_files()))
    server = grpc.aio.server(interceptors=interceptors, options=(*_OPTIONS, bound))
    pb_grpc.add_CoordinatorServicer_to_server(CoordinatorService(handlers, chunk_bytes), server)
    pb_grpc.add_BlobExchangeServicer_to_server(BlobService(handlers, chunk_bytes), server)
    services = [service.full_name for service in pb.DESCRIPTOR.services_by_name.values()]
    health_service = await _add_health(server, services)
    reflection.enable_server_reflection((*services, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    port = _bind(server, address, security)
    await server.start()
    return RunningServer(Address(address.host, port), security is not None, server, health_service)


def check_listen(listen: str, security: ServerSecurity | None, insecure: bool) -> Address:
    """The address, if a server may listen there; raises BadAddress, CannotListen where traffic would be unprotected."""
    address = parse_address(listen)
    if security is not None or address.is_loopback:
        return address
    if not insecure:
        raise CannotListen(
            f"{address} is reachable from other machines and the run has no certificates; make them with "
            "`dipaco certs`, listen on 127.0.0.1, or pass --insecure on a network you trust"
        )
    logger.warning(
        "listening at %s without TLS and without a token: anyone who reaches it can join or read the run", address
    )
    return address


async def _add_health(server: Any, services: Sequence[str]) -> Any:
    servicer = health.aio.HealthServicer()  # type: ignore[attr-defined, unused-ignore]
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    for service in ("", *services):
        await servicer.set(service, health_pb2.HealthCheckResponse.SERVING)
    return servicer


def _credentials(security: ServerSecurity) -> Any:
    """TLS with the server's certificate; where workers need one, only with a certificate of the run's CA."""
    pair = (security.key_pem, security.certificate_pem)
    if not security.require_certificates:
        return grpc.ssl_server_credentials([pair])
    return grpc.ssl_server_credentials([pair], root_certificates=security.ca_pem, require_client_auth=True)


def _bind(server: Any, address: Address, security: ServerSecurity | None) -> int:
    """Bind the address; returns the port. Raises CannotListen."""
    try:
        if security is None:
            port = int(server.add_insecure_port(str(address)))
        else:
            port = int(server.add_secure_port(str(address), _credentials(security)))
    except RuntimeError:
        port = 0
    if port == 0:
        raise CannotListen(f"cannot listen at {address}: the port is taken or the host is not one of this machine's")
    return port
