"""A conversation with a base model at the terminal, and how much of it is read again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from dipaco.ending import Refused
from inference.chat_template import conversation, turn

OPENING = "A conversation between a user and an assistant.\n"


def room_for_turns(sequence_length: int, tokens: int, count: Callable[[str], int]) -> int:
    """The tokens that a sequence has beside an answer of `tokens`; raises Refused where no turn could be read again."""
    room = sequence_length - tokens
    least = count(Conversation(turns=[("Hello", "Hello")]).prompt("Hello"))
    if room < least:
        raise Refused(
            f"--tokens {tokens} leaves {max(room, 0)} of the {sequence_length} tokens of a sequence to the turns "
            f"before, and a short one takes {least}: every answer would forget the turns before it; "
            + (f"give --tokens {sequence_length - least} or less" if sequence_length > least else "give --plain")
        )
    return room


@dataclass
class Conversation:
    """Turns so far. The prompt of the next answer holds as many of the newest turns as fit into `max_tokens`."""

    opening: str = OPENING
    turns: list[tuple[str, str]] = field(default_factory=list)

    def prompt(self, said: str, fits: int | None = None) -> str:
        """The text that the model continues to answer `said`; `fits`: with so many of the newest turns (None: all)."""
        kept = self.turns if fits is None else self.turns[len(self.turns) - fits :]
        lines = [line for asked, answered in kept for line in (turn("user", asked), turn("assistant", answered))]
        return conversation([self.opening.rstrip("\n"), *lines, turn("user", said)])

    def prompt_within(self, said: str, max_tokens: int, count: Callable[[str], int]) -> str:
        """The same with the most turns whose text has at most so many tokens, as `count` tells."""
        for fits in range(len(self.turns), 0, -1):
            if count(prompt := self.prompt(said, fits)) <= max_tokens:
                return prompt
        return self.prompt(said, 0)

    def add(self, said: str, answered: str) -> None:
        self.turns.append((said, answered.strip()))
