"""Sizes as people write them: 2GiB, 512 MB, 1000000."""

from __future__ import annotations

import re

_UNITS = {"": 1, "b": 1} | {
    name: factor
    for power, letter in enumerate("kmgt", 1)
    for name, factor in ((f"{letter}ib", 1024**power), (f"{letter}b", 1000**power))
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


class BadSize(ValueError):
    """Text that is no size in bytes."""


def parse_bytes(text: str) -> int:
    """Bytes; raises BadSize."""
    found = _SIZE.fullmatch(text)
    if found is None or found[2].lower() not in _UNITS or float(found[1]) == 0:
        raise BadSize(f"{text!r} is no size in bytes; write one like 2GiB, 512MiB or 1000000")
    return int(float(found[1]) * _UNITS[found[2].lower()])
