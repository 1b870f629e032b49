"""Who is let in: tokens that end, certificates that are revoked, over or missing, each with its sentence."""

from __future__ import annotations

import datetime

import pytest

from protocol.admission import Admission
from protocol.errors import Forbidden, NotAllowed
from protocol.peer import Peer
from protocol.tokens import Tokens, token_sha256

OLD, NEW = "Bearer " + "o" * 43, "Bearer " + "n" * 43
ENDS = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)
NOW_S = ENDS.timestamp() - 1000.0
ALICE = Peer("alice", "a1", ENDS)


def admission(**changes: object) -> Admission:
    tokens = Tokens(token_sha256("o" * 43)).rotated("n" * 43, NOW_S + 10)
    return Admission(tokens, "n" * 43, **changes)  # type: ignore[arg-type]


def test_a_token_that_ends_is_exchanged_until_it_has_ended() -> None:
    assert admission().check(NEW, None, NOW_S) == ""
    assert admission().check(OLD, None, NOW_S) == "n" * 43
    with pytest.raises(NotAllowed, match="was replaced and has ended; copy the run's new join file"):
        admission().check(OLD, None, NOW_S + 10)


def test_a_revoked_certificate_is_refused_whatever_its_token() -> None:
    revoked = admission(revoked={"a1": ENDS})
    with pytest.raises(Forbidden, match=r"'alice' \(serial a1\) was revoked on 2030-01-01 00:00 UTC; ask who runs"):
        revoked.check(NEW, ALICE, NOW_S)
    assert revoked.check(NEW, Peer("alice", "a2", ENDS), NOW_S) == ""


def test_a_certificate_that_is_over_is_refused_on_an_old_connection_too() -> None:
    assert admission().check(NEW, ALICE, ENDS.timestamp() - 1) == ""
    with pytest.raises(Forbidden, match="ended on 2030-01-01 00:00 UTC; `dipaco certs RUN --worker alice`"):
        admission().check(NEW, ALICE, ENDS.timestamp())


def test_a_certificate_is_needed_only_where_it_is_required() -> None:
    assert admission().check(NEW, None, NOW_S) == ""
    with pytest.raises(NotAllowed, match="`dipaco certs RUN --worker NAME` writes"):
        admission(require_certificates=True).check(NEW, None, NOW_S)


def test_a_certificate_does_not_stand_in_for_the_token() -> None:
    with pytest.raises(NotAllowed, match="wrong"):
        admission(require_certificates=True).check("Bearer " + "x" * 43, ALICE, NOW_S)
