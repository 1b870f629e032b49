"""HOST:PORT as people write it, and whether it stays on this machine."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass


class BadAddress(ValueError):
    """Text that is not HOST:PORT."""


@dataclass(frozen=True, slots=True)
class Address:
    """A host (name, IPv4 or IPv6 without brackets) and a port; port 0 asks the system for a free one."""

    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether traffic to it cannot leave this machine."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """The address in `HOST:PORT` or `[IPv6]:PORT`; raises BadAddress."""
    host, colon, port = text.strip().rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise BadAddress(f"address {text!r}: an IPv6 host is written in brackets, like [::1]:7070")
    if not colon or not host or any(letter.isspace() or letter == "/" for letter in host):
        raise BadAddress(f"address {text!r} is not HOST:PORT, like 127.0.0.1:7070")
    if not (port.isascii() and port.isdigit() and int(port) < 65536):
        raise BadAddress(f"address {text!r}: the port must be a number from 0 to 65535, not {port!r}")
    return Address(host, int(port))
