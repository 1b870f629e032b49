"""Tokens to text as they come: no half characters, and nothing of a stop string is ever shown.

A byte-level decoder shows an unfinished character as one U+FFFD at the end; all text before it is final.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_UNFINISHED = "\ufffd"
# The decoded window: long enough that its end never depends on where it begins (a character has at most 4 bytes).
_LONGEST_WINDOW, _KEPT_WINDOW = 32, 16


class TextStream:
    """The text of one generation. After `stopped` nothing more is shown: one of the `stop` strings was written."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(text for text in stop if text)
        self._window: list[int] = []
        self._shown = 0  # characters of the window's text that were handed on
        self._held = ""  # text that may be the beginning of a stop string
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is sure after one more token; often empty, sometimes of several tokens."""
        self._window.append(token)
        text = self._decode(self._window)
        new = self._take(text.removesuffix(_UNFINISHED))
        if len(self._window) > _LONGEST_WINDOW:
            del self._window[:-_KEPT_WINDOW]
            self._shown = len(self._decode(self._window).removesuffix(_UNFINISHED))
        return self._release(new)

    def end(self) -> str:
        """What is left when no token follows; the last character may be an unfinished one."""
        if self.stopped:
            return ""
        rest = self._release(self._take(self._decode(self._window)))
        held, self._held = self._held, ""
        return rest if self.stopped else rest + held

    def _take(self, text: str) -> str:
        new = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return new

    def _release(self, new: str) -> str:
        """What of the held and new text can be shown: up to a stop string, or to what may become one."""
        if self.stopped:
            return ""
        text = self._held + new
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
