"""How a conversation reads to a base model: plain lines, with `User:` and `Assistant:` before the turns."""

from __future__ import annotations

from collections.abc import Iterable

_NAMES = {"user": "User:", "assistant": "Assistant:"}
# Where an answer ends, beside the stop strings that are asked for: the model begins another turn.
TURN_ENDS = tuple(f"\n{name}" for name in _NAMES.values())


def turn(role: str, text: str) -> str:
    """What somebody said; instructions, of any other role, stand as they are."""
    return f"{_NAMES[role]} {text}" if role in _NAMES else text


def conversation(turns: Iterable[str]) -> str:
    """The turns, and the place of the next answer."""
    return "\n".join([*turns, _NAMES["assistant"]])
