"""The refusals that cross the wire, and the ONE table that says which gRPC status each of them travels as.

The server's interceptor turns exceptions into statuses, `from_rpc_error` turns them back on the client. The name of the
exception travels in a trailing metadata entry, so that two that share a status stay apart.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc

from protocol.tasks import MalformedMessage

logger = logging.getLogger(__name__)


class StaleLease(ValueError):
    """The lease was lost, or another fence is live: nothing was changed; drop the task."""


class UnknownWorker(ValueError):
    """The coordinator does not know the worker (it was restarted, or forgot it): say hello again."""


class UnknownTask(ValueError):
    """No task of that id is in the run."""


class UnknownBlob(ValueError):
    """The store does not hold the blob."""


class VersionMismatch(ValueError):
    """The two sides speak different major versions of the protocol."""


class NotAllowed(ValueError):
    """The join token is missing or wrong, the certificate is not trusted, or traffic would be unprotected."""


class RejectedTensor(ValueError):
    """Tensors that are not the declared ones: names, shapes, dtypes, or not finite."""


class CorruptBlob(ValueError):
    """The bytes that arrived do not have the digest they were announced with."""


class DiskFull(OSError):
    """There is no room for the bytes at the receiving side."""


class Unavailable(ConnectionError):
    """Nobody answers at the address, or not in time. The only refusal that is worth the same call again."""


class RemoteFailure(RuntimeError):
    """The other side failed in a way that it has no name for: a bug there; its log says more."""


# Where several share a status, the first is meant when the name did not travel along.
STATUS_OF: dict[type[Exception], grpc.StatusCode] = {
    StaleLease: grpc.StatusCode.FAILED_PRECONDITION,
    VersionMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    UnknownBlob: grpc.StatusCode.NOT_FOUND,
    UnknownTask: grpc.StatusCode.NOT_FOUND,
    UnknownWorker: grpc.StatusCode.NOT_FOUND,
    NotAllowed: grpc.StatusCode.UNAUTHENTICATED,
    MalformedMessage: grpc.StatusCode.INVALID_ARGUMENT,
    RejectedTensor: grpc.StatusCode.INVALID_ARGUMENT,
    CorruptBlob: grpc.StatusCode.DATA_LOSS,
    DiskFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    RemoteFailure: grpc.StatusCode.INTERNAL,
}
# For `except WIRE_ERRORS`: everything that a call to the other side may raise.
WIRE_ERRORS: tuple[type[Exception], ...] = tuple(STATUS_OF)
