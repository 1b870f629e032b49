"""A text while it is written: its pieces with the path of each, and at the end how fast it was."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from corpus.tokenizer import Tokenizer
from inference.engine import GeneratedToken
from inference.text_stream import TextStream

COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "red", "bright_cyan", "bright_green", "bright_magenta")


@dataclass(frozen=True, slots=True)
class Stroke:
    """Text, and the path of the token that completed it. `switched`: another path wrote what stands before."""

    text: str
    path: str
    switched: bool


class Writing:
    """Iterate it once; what follows the last stroke is known afterwards. `clock` in seconds."""

    def __init__(
        self,
        tokens: Iterator[GeneratedToken],
        tokenizer: Tokenizer,
        path_id: Callable[[int], str],
        stop: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tokens, self._path_id, self._clock = tokens, path_id, clock
        self._stream = TextStream(tokenizer.decode, stop)
        self._parts: list[str] = []
        self._began_s = clock()
        self.first_token_s = self.end_s = 0.0
        self.tokens = 0
        self.finish = ""
        self.paths: list[str] = []  # that wrote it, in order

    @property
    def text(self) -> str:
        """What was written so far."""
        return "".join(self._parts)

    @property
    def tokens_per_s(self) -> float:
        """Of the tokens after the first."""
        passed = self.end_s - self.first_token_s
        return (self.tokens - 1) / passed if passed > 0 else 0.0

    def __iter__(self) -> Iterator[Stroke]:
        for token in self._tokens:
            yield self._stroke(token)
            if self._stream.stopped:
                break
        rest = self._stream.end()
        self.finish = "stop" if self._stream.stopped else self.finish
        self._parts.append(rest)
        if rest and self.paths:
            yield Stroke(rest, self.paths[-1], switched=False)

    def _stroke(self, token: GeneratedToken) -> Stroke:
        self.tokens += 1
        self.end_s = self._clock() - self._began_s
        if self.tokens == 1:
            self.first_token_s = self.end_s
        path = self._path_id(token.path_index)
        switched = bool(self.paths) and self.paths[-1] != path
        if switched or not self.paths:
            self.paths.append(path)
        self.finish = token.finish or ""
        ended = token.finish == "stop"  # the token that ends a text stands for none
        text = "" if ended else self._stream.add(token.token)
        self._parts.append(text)
        return Stroke(text, path, switched)

    def speed(self) -> str:
        """One line for people."""
        return (
            f"{self.tokens} tokens, the first after {self.first_token_s:.2f} s, then {self.tokens_per_s:.1f} tokens/s; "
            f"path {' > '.join(self.paths)}"
        )


def colour_of(path: str, seen: dict[str, str]) -> str:
    """The colour of a path, the same for as long as `seen` is kept; with many paths colours come again."""
    return seen.setdefault(path, COLOURS[len(seen) % len(COLOURS)])


def show(writing: Writing, console: Any, colours: dict[str, str]) -> None:
    """Print a text as it is written: each path in its colour, its name where the paths change."""
    from rich.text import Text

    for stroke in writing:
        colour = colour_of(stroke.path, colours)
        if stroke.switched:
            console.print(Text(f"[{stroke.path}]", f"reverse {colour}"), end="", soft_wrap=True)
        if stroke.text:
            console.print(Text(stroke.text, f"bold {colour}"), end="", soft_wrap=True)
    console.print()
    console.print(Text(writing.speed(), "dim"), soft_wrap=True)
