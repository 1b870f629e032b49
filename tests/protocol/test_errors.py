"""The table of refusals: there and back for every one of them, and what stands for gRPC's own failures."""

from __future__ import annotations

import errno

import grpc
import pytest

from protocol.errors import (
    MAX_MESSAGE_CHARACTERS,
    NAME_KEY,
    STATUS_OF,
    DiskFull,
    NotAllowed,
    RemoteFailure,
    StaleLease,
    Unavailable,
    VersionMismatch,
    from_rpc_error,
    refusal_of,
)


class Failed:
    """What a client sees of a failed call."""

    def __init__(self, status: str, details: str, name: str = "") -> None:
        self._status, self._details = status, details
        self._trailer = ((NAME_KEY, name),) if name else None

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode[self._status]

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> tuple[tuple[str, str], ...] | None:
        return self._trailer


@pytest.mark.parametrize("kind", list(STATUS_OF))
def test_every_refusal_comes_back_as_itself(kind: type[Exception]) -> None:
    refusal = refusal_of(kind("what happened,\n  and what to do"))
    assert refusal is not None
    assert grpc.StatusCode[refusal.status] is not grpc.StatusCode.OK
    error = from_rpc_error(Failed(refusal.status, refusal.message, refusal.name), "host:1")
    assert type(error) is kind
    assert str(error) == "what happened, and what to do"


def test_a_narrower_refusal_travels_as_its_parent() -> None:
    class VeryStale(StaleLease):
        pass

    refusal = refusal_of(VeryStale("old"))
    assert refusal is not None
    assert refusal.name == "StaleLease"


def test_what_is_not_in_the_table_has_no_status() -> None:
    assert refusal_of(KeyError("x")) is None
    assert refusal_of(OSError(errno.EACCES, "no")) is None


def test_a_full_disk_is_recognised() -> None:
    refusal = refusal_of(OSError(errno.ENOSPC, "No space left on device", "spool/x"))
    assert refusal is not None
    assert (refusal.name, "spool/x" in refusal.message) == ("WaitingForRoom", True)
    assert issubclass(DiskFull, OSError)


def test_long_messages_are_cut() -> None:
    refusal = refusal_of(StaleLease("x" * 100_000))
    assert refusal is not None
    assert len(refusal.message) == MAX_MESSAGE_CHARACTERS


@pytest.mark.parametrize(
    ("status", "details", "kind"),
    [
        ("UNAVAILABLE", "connection refused", Unavailable),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", Unavailable),
        ("CANCELLED", "Channel closed!", Unavailable),
        ("INTERNAL", "Received RST_STREAM with error code 2", Unavailable),
        ("UNKNOWN", "Stream removed", Unavailable),
        ("INTERNAL", "Exception deserializing request!", RemoteFailure),
        ("RESOURCE_EXHAUSTED", "Received message larger than max", RemoteFailure),
        ("UNAVAILABLE", "Ssl handshake failed: CERTIFICATE_VERIFY_FAILED", NotAllowed),
        ("UNIMPLEMENTED", "Method not found!", VersionMismatch),
        ("PERMISSION_DENIED", "proxy says no", NotAllowed),
    ],
)
def test_failures_without_a_name_are_told_apart(status: str, details: str, kind: type[Exception]) -> None:
    error = from_rpc_error(Failed(status, details), "host:1")
    assert type(error) is kind
    assert "host:1" in str(error)


@pytest.mark.parametrize(
    ("details", "unanswered_plain", "hinted"),
    [
        ("failed to connect to all addresses; last error: UNAVAILABLE: ipv4:1.2.3.4:7070: Socket closed", True, True),
        ("recvmsg:Connection reset by peer", True, True),
        ("connection refused", True, False),
        ("Socket closed", False, False),
    ],
)
def test_who_is_hung_up_on_may_need_the_join_file(details: str, unanswered_plain: bool, hinted: bool) -> None:
    error = from_rpc_error(Failed("UNAVAILABLE", details), "host:1", unanswered_plain=unanswered_plain)
    assert str(error).endswith("; it may require the join file (--join)") is hinted


def test_an_unknown_name_of_a_newer_side_is_still_an_error() -> None:
    assert type(from_rpc_error(Failed("ABORTED", "new", "BrandNew"), "host:1")) is RemoteFailure
