"""What of a conversation is read again, and answers too long for any of it."""

from __future__ import annotations

import pytest

from dipaco.chatting import Conversation, room_for_turns
from dipaco.ending import Refused

ONE_TURN = len(Conversation(turns=[("Hello", "Hello")]).prompt("Hello"))


@pytest.mark.parametrize("tokens", [256 - ONE_TURN + 1, 256, 300])
def test_answers_that_leave_no_room_for_a_turn_are_refused(tokens: int) -> None:
    left = max(256 - tokens, 0)
    with pytest.raises(Refused) as refused:
        room_for_turns(256, tokens, len)
    assert str(refused.value) == (
        f"--tokens {tokens} leaves {left} of the 256 tokens of a sequence to the turns before, and a short one "
        f"takes {ONE_TURN}: every answer would forget the turns before it; give --tokens {256 - ONE_TURN} or less"
    )
    with pytest.raises(Refused, match="give --plain"):
        room_for_turns(ONE_TURN, 1, len)


def test_the_most_tokens_that_are_taken_leave_room_for_a_turn() -> None:
    room = room_for_turns(256, 256 - ONE_TURN, len)
    conversation = Conversation(turns=[("Hello", "Hello")])
    assert conversation.prompt_within("Hello", room, len).count("User: Hello") == 2
