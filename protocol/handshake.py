"""Finds out whether a TLS server hangs up because it was shown no certificate: gRPC's clients do not hear the reason.

gRPC's servers end such a connection when the handshake is over, without a word; any other client is greeted there with
the settings of HTTP/2.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import time

from protocol.address import Address
from protocol.security import COORDINATOR_NAME

PATIENCE_S = 5.0
# A server that is just ending may hang up once; it does not take a second connection.
_ATTEMPTS, _PAUSE_S = 2, 0.3


def requires_certificate(address: Address, ca_pem: str) -> bool:
    """Whether the server, which must be the run's, ends handshakes without a client certificate.

    False also where it cannot be asked.
    """
    context = ssl.create_default_context(cadata=ca_pem)
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # as gRPC verifies; Python's default differs between versions
    context.set_alpn_protocols(["h2"])
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE_S)
        if not _hangs_up(address, context):
            return False
    return True


def _hangs_up(address: Address, context: ssl.SSLContext) -> bool:
    try:
        with (
            contextlib.closing(socket.create_connection((address.host, address.port), PATIENCE_S)) as plain,
            context.wrap_socket(plain, server_hostname=COORDINATOR_NAME) as secured,
        ):
            return secured.recv(1) == b""
    except OSError:
        return False
