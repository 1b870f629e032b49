"""Worker ids that belong to a certificate: nobody else may use them, and no table needs to be kept for it."""

from __future__ import annotations

import pytest

from coordinator.ownership import check_owner, new_worker_id
from protocol.errors import Forbidden, refusal_of


def test_an_id_belongs_to_the_certificate_it_was_given_to() -> None:
    given = new_worker_id(7, "alice")
    check_owner(given, "alice")
    with pytest.raises(Forbidden, match="was not given to the certificate 'mallory'"):
        check_owner(given, "mallory")


def test_ids_differ_by_their_bits() -> None:
    assert new_worker_id(1, "alice") != new_worker_id(2, "alice")
    assert new_worker_id(1, "alice") != new_worker_id(1, "bob")


def test_a_certificate_may_not_take_an_id_that_was_given_without_one() -> None:
    with pytest.raises(Forbidden):
        check_owner(new_worker_id(7, ""), "mallory")


def test_without_certificates_an_id_is_free() -> None:
    check_owner(new_worker_id(7, ""), "")
    check_owner("", "alice")
    assert new_worker_id(0xABC, "") == "w000000000abc"


def test_it_travels_as_permission_denied() -> None:
    refusal = refusal_of(Forbidden("no"))
    assert refusal is not None
    assert (refusal.status, refusal.name) == ("PERMISSION_DENIED", "Forbidden")
