"""Addresses as people write them."""

from __future__ import annotations

import pytest

from protocol.address import Address, BadAddress, parse_address


@pytest.mark.parametrize(
    ("text", "address", "loopback"),
    [
        ("127.0.0.1:7070", Address("127.0.0.1", 7070), True),
        ("127.8.8.8:1", Address("127.8.8.8", 1), True),
        ("localhost:0", Address("localhost", 0), True),
        ("[::1]:7070", Address("::1", 7070), True),
        ("0.0.0.0:7070", Address("0.0.0.0", 7070), False),
        ("[::]:7070", Address("::", 7070), False),
        ("gpu-3.example:65535", Address("gpu-3.example", 65535), False),
        ("localhost.example:1", Address("localhost.example", 1), False),
    ],
)
def test_reads_and_writes_addresses(text: str, address: Address, loopback: bool) -> None:
    assert parse_address(text) == address
    assert str(address) == text
    assert address.is_loopback is loopback


@pytest.mark.parametrize(
    "text", ["", ":", ":80", "host", "host:", "host:-1", "host:65536", "host:x", "::1:80", "a b:1"]
)
def test_refuses_what_is_none(text: str) -> None:
    with pytest.raises(BadAddress, match="address"):
        parse_address(text)
