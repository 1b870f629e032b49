"""A side line opens when it is used, and never again once it is closed."""

from __future__ import annotations

from typing import Any

import pytest

from protocol.errors import Unavailable
from worker.side_line import SideLine


class Client:
    closed = 0

    def close(self) -> None:
        self.closed += 1


def test_it_opens_once_and_closes_for_ever() -> None:
    opened: list[Any] = []

    def connect(patience_s: float | None) -> Any:
        assert patience_s == 5.0
        opened.append(Client())
        return opened[-1]

    line = SideLine(connect, 5.0)
    assert line.client() is line.client()
    line.close()
    assert [client.closed for client in opened] == [1]
    with pytest.raises(Unavailable):
        line.client()
    assert len(opened) == 1


def test_closed_before_its_first_use_it_opens_nothing() -> None:
    line = SideLine(lambda patience_s: pytest.fail("nobody asked"), 1.0)
    line.close()
    with pytest.raises(Unavailable):
        line.client()
