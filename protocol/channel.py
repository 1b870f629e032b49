"""The way from a worker to a coordinator: TLS (with the worker's certificate, if it has one), or plain on loopback.

Workers only ever dial out, and pings keep the connection alive through NAT. No message limit is raised. Calls are
retried by worker/client.py, not by the channel, so that there is one place that does.
"""

from __future__ import annotations

from typing import Any

import grpc

from protocol.address import Address
from protocol.admission import SCHEME
from protocol.errors import NotAllowed
from protocol.joinfile import JoinFile
from protocol.security import COORDINATOR_NAME

# Home routers forget a silent connection after a minute or more: one ping half that often keeps it.
KEEPALIVE_S = 30
_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.keepalive_time_ms", KEEPALIVE_S * 1000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
)


# Trailing metadata of an answer to a call whose token is about to end: the new one. Over TLS only.
RENEWED_TOKEN_KEY = "dipaco-token"


def open_channel(address: Address, join: JoinFile | None, *, insecure: bool = False) -> Any:
    """A `grpc.Channel`, which connects when it is first used.

    Raises NotAllowed where the address is not loopback, there is no join file, and `insecure` does not ask for it.
    """
    options = list(_OPTIONS)
    if address.is_loopback:
        options.append(("grpc.enable_http_proxy", 0))
    if join is None:
        if not address.is_loopback and not insecure:
            raise NotAllowed(
                f"{address} is another machine: give the run's join file (--join), or --insecure on a network you trust"
            )
        return grpc.insecure_channel(str(address), options=options)
    options.append(("grpc.ssl_target_name_override", COORDINATOR_NAME))
    return grpc.secure_channel(str(address), _credentials(join), options=options)


def _credentials(join: JoinFile) -> Any:
    """TLS that trusts the run's CA alone, and shows the worker's certificate to a coordinator that asks for it."""
    if join.certificate_pem is None or join.key_pem is None:
        return grpc.ssl_channel_credentials(join.ca_pem.encode())
    return grpc.ssl_channel_credentials(join.ca_pem.encode(), join.key_pem.encode(), join.certificate_pem.encode())


def call_metadata(token: str) -> tuple[tuple[str, str], ...]:
    """What every call carries: the token, where there is one."""
    return (("authorization", SCHEME + token),) if token else ()
