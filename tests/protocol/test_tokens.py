"""Tokens and their replacement: what each is worth at which time, and that the file keeps exactly that."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.tokens import MAX_RETIRED, BadTokenFile, Tokens, new_token, token_sha256


def test_a_replaced_token_ends() -> None:
    first, second = new_token(), new_token()
    tokens = Tokens(token_sha256(first)).rotated(second, ends_s=100.0)
    assert tokens.standing(second, 1000.0) == "current"
    assert [tokens.standing(first, now) for now in (99.9, 100.0)] == ["ending", "ended"]
    assert tokens.standing(new_token(), 0.0) == "unknown"
    assert tokens.standing("", 0.0) == "unknown"


def test_no_older_one_outlives_the_one_that_was_replaced_last() -> None:
    first, second, third = new_token(), new_token(), new_token()
    tokens = Tokens(token_sha256(first)).rotated(second, 100.0)
    later, sooner = tokens.rotated(third, 200.0), tokens.rotated(third, 50.0)
    assert [later.standing(token, 150.0) for token in (first, second, third)] == ["ended", "ending", "current"]
    assert [sooner.standing(token, 60.0) for token in (first, second, third)] == ["ended", "ended", "current"]


def test_an_announced_token_admits_beside_the_others_until_a_rotation_decides_on_it() -> None:
    first, second, third, fourth = (new_token() for _ in range(4))
    announced = Tokens(token_sha256(first)).rotated(second, 100.0).announced(third)
    standings = [announced.standing(token, 50.0) for token in (first, second, third)]
    assert standings == ["ending", "current", "ending"]
    assert announced.standing(third, 4e9) == "ending"
    assert Tokens.parse(announced.text()) == announced
    assert announced.announced(first) == announced.announced(second) == announced
    made_current = announced.rotated(third, 200.0)
    assert made_current == Tokens(token_sha256(first)).rotated(second, 100.0).rotated(third, 200.0)
    passed_over = announced.rotated(fourth, 200.0)
    assert [passed_over.standing(third, now) for now in (199.0, 200.0)] == ["ending", "ended"]


def test_only_so_many_are_remembered() -> None:
    tokens = Tokens(token_sha256(new_token()))
    for _ in range(MAX_RETIRED + 5):
        tokens = tokens.rotated(new_token(), 1.0)
    assert len(tokens.retired) == MAX_RETIRED


@given(st.lists(st.floats(0, 4e9).map(lambda end: round(end, 3)), max_size=5))
def test_the_file_holds_what_was_written(ends: list[float]) -> None:
    tokens = Tokens(token_sha256("a"))
    for index, end in enumerate(ends):
        tokens = tokens.rotated(f"b{index}", end)
    assert Tokens.parse(tokens.text()) == tokens


def test_the_file_of_a_run_made_before_holds_one_hash() -> None:
    assert Tokens.parse("ab" * 32 + "\n") == Tokens("ab" * 32)


@pytest.mark.parametrize(
    "text", ["", "x", "ab" * 31, "ab" * 32 + " 5", "ab" * 32 + "\n" + "cd" * 32, "ab" * 32 + "\nx"]
)
def test_a_damaged_file_is_named(text: str) -> None:
    with pytest.raises(BadTokenFile, match="rotate-token"):
        Tokens.parse(text)
