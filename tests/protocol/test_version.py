"""Which workers may join, by version."""

from __future__ import annotations

import pytest

from protocol.errors import VersionMismatch
from protocol.version import PROTOCOL_MAJOR, check_worker_version, package_version


def test_the_same_major_is_accepted() -> None:
    check_worker_version(PROTOCOL_MAJOR, "99.0")


@pytest.mark.parametrize("major", [0, PROTOCOL_MAJOR + 1])
def test_another_major_is_refused_with_what_to_install(major: int) -> None:
    with pytest.raises(VersionMismatch, match=f"install dipaco=={package_version()} on the worker") as caught:
        check_worker_version(major, "99.0")
    assert f"protocol {major} (dipaco 99.0)" in str(caught.value)
