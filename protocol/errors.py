"""The refusals that cross the wire, and the ONE table that says which gRPC status each of them travels as.

The server's interceptor turns exceptions into statuses by `refusal_of`, the client back by `from_rpc_error`. The name
of the exception travels in a trailing metadata entry, so that two that share a status stay apart.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Any

from protocol.tasks import MalformedMessage


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


class Banned(NotAllowed):
    """The worker sent a wrong result and is no longer let in; the evidence is kept in the run directory."""


class Forbidden(NotAllowed):
    """The caller is known and shut out: its certificate is revoked, or the worker id belongs to another one."""


class RejectedTensor(ValueError):
    """Tensors that are not the declared ones: names, shapes, dtypes, or not finite."""


class CorruptBlob(ValueError):
    """The bytes that arrived do not have the digest they were announced with."""


class DiskFull(OSError):
    """There is no room for the bytes where they should be kept."""


class WaitingForRoom(DiskFull):
    """The coordinator's disk is full for now. Nothing was changed; the same call is worth making again."""


class UnservedModel(ValueError):
    """The server of texts does not serve a model, or a path, of that name."""


class Overloaded(RuntimeError):
    """All places of the server of texts and its queue are taken. The same call is worth making again."""


class Unavailable(ConnectionError):
    """Nobody answers at the address, or not in time. The same call is worth making again."""


class RemoteFailure(RuntimeError):
    """The other side failed in a way that has no name: a bug there; its log says more."""


# Status names of grpc.StatusCode.
STATUS_OF: dict[type[Exception], str] = {
    StaleLease: "FAILED_PRECONDITION",
    VersionMismatch: "FAILED_PRECONDITION",
    UnknownBlob: "NOT_FOUND",
    UnknownTask: "NOT_FOUND",
    UnknownWorker: "NOT_FOUND",
    UnservedModel: "NOT_FOUND",
    NotAllowed: "UNAUTHENTICATED",
    Banned: "PERMISSION_DENIED",
    Forbidden: "PERMISSION_DENIED",
    MalformedMessage: "INVALID_ARGUMENT",
    RejectedTensor: "INVALID_ARGUMENT",
    CorruptBlob: "DATA_LOSS",
    DiskFull: "RESOURCE_EXHAUSTED",
    WaitingForRoom: "RESOURCE_EXHAUSTED",
    Overloaded: "RESOURCE_EXHAUSTED",
    Unavailable: "UNAVAILABLE",
    RemoteFailure: "INTERNAL",
}
# For `except WIRE_ERRORS`: everything that a call to the other side may raise.
WIRE_ERRORS: tuple[type[Exception], ...] = tuple(STATUS_OF)

NAME_KEY = "dipaco-error"
MAX_MESSAGE_CHARACTERS = 1500
_BY_NAME = {kind.__name__: kind for kind in STATUS_OF}
# Statuses without a name come from gRPC itself, or from something between the two sides.
_UNREACHED = ("UNAVAILABLE", "CANCELLED", "DEADLINE_EXCEEDED")
_CUT_OFF = ("RST_STREAM", "Stream removed", "GOAWAY", "Connection reset")
# What a client without a join file sees of a side that speaks TLS, or one without a certificate where one is required.
HUNG_UP = ("Socket closed", "Connection reset", "connection reset")
_UNTRUSTED = (
    "CERTIFICATE_VERIFY_FAILED",
    "certificate verify failed",
    "Hostname Verification",
    "does not match target",
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """How an exception travels: the name of its gRPC status, its own name, and its message on one line."""

    status: str
    name: str
    message: str


def refusal_of(error: Exception) -> Refusal | None:
    """How the exception travels; None where the table does not know it."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        if not isinstance(error, DiskFull):
            error = WaitingForRoom(f"no space is left on the device: {error.filename or 'at the receiving side'}")
    for kind in type(error).__mro__:
        if kind in STATUS_OF:
            return Refusal(STATUS_OF[kind], kind.__name__, one_line(str(error)))
    return None


def one_line(message: str) -> str:
    """The message without line breaks and cut to what fits a status."""
    return " ".join(message.split())[:MAX_MESSAGE_CHARACTERS]


def from_rpc_error(error: Any, address: str, *, unanswered_plain: bool = False) -> Exception:
    """The domain exception that a failed call (a `grpc.RpcError`) stands for; `address` names the other side.

    `unanswered_plain`: without TLS, and nothing was ever answered.
    """
    status, details = error.code().name, one_line(error.details() or "")
    name = dict(error.trailing_metadata() or ()).get(NAME_KEY, "")
    if name in _BY_NAME:
        return _BY_NAME[name](details)
    if "certificate has expired" in details:
        return NotAllowed(
            f"the certificate of {address} has ended (or the clock of this machine is wrong); it is renewed there with "
            "`dipaco certs RUN` and a new start of the coordinator"
        )
    if any(sign in details for sign in _UNTRUSTED):
        return NotAllowed(
            f"the certificate of {address} is not signed by the CA of the join file; get the run's newest one"
        )
    if status in _UNREACHED or any(sign in details for sign in _CUT_OFF):
        hung_up = unanswered_plain and any(sign in details for sign in HUNG_UP)
        hint = "; it may require the join file (--join)" if hung_up else ""
        return Unavailable(f"nobody answers at {address} ({details}){hint}")
    if status in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        return NotAllowed(f"{address} refuses the call: {details}")
    if status == "UNIMPLEMENTED":
        return VersionMismatch(f"{address} does not offer this call ({details}); use the same version of dipaco there")
    return RemoteFailure(f"{address} answers {status}: {details}")
