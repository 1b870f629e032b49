"""A bounded number of the cases of scripts/fuzz.py, and the proof that it would notice what it looks for."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from scripts import fuzz_values as values
from scripts.fuzz import CASES, Wish, carry_out_case, fuzz, growth_a_thousand_cases
from scripts.fuzz_calls import NOBODY, filled
from scripts.fuzz_peer import METHODS, Finding, Method, Peer

SEED = 11


def test_an_attacked_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    outcome = fuzz(Wish(SEED, 300, 0.0), tmp_path, lambda line: None)
    assert outcome["findings"] == []
    assert outcome["cases"] == 300
    assert outcome["digest_equal"] is True
    asked = {answer.split()[0] for answer in outcome["answers"]}
    assert asked >= {method.name for method in Method.all()}
    statuses = {answer.split()[1] for answer in outcome["answers"]}
    assert statuses >= {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "DATA_LOSS"}


class Refusing(Peer):
    """A peer that is answered as a broken coordinator would answer."""

    def __init__(self, status: str) -> None:
        self.status = status
        self.draw = random.Random(0)
        self.tasks, self.digests = [], []

    def ask(self, method: Method, messages: object, **more: object) -> tuple[str, list[bytes]]:
        if self.status == "INTERNAL":
            raise Finding(f"{method.name} is answered {self.status}")
        return self.status, []


def test_a_finding_names_the_case_that_made_it() -> None:
    with pytest.raises(Finding, match=r"^fuzz_\w+\.\w+: .*INTERNAL"):
        carry_out_case(SEED, Refusing("INTERNAL"), 0)


def test_a_case_is_the_same_whenever_it_is_repeated() -> None:
    def drawn() -> list[bytes]:
        peer = Refusing("OK")
        peer.draw = random.Random("3/5")
        messages = [filled(peer.draw, method.request, peer, NOBODY) for method in METHODS.values()]
        return [message.SerializeToString(deterministic=True) for message in messages]

    assert drawn() == drawn()
    assert len({case.__name__ for case in CASES}) == len(CASES) >= 15


def test_what_is_broken_differs_and_what_is_packed_may_be_read() -> None:
    draw = random.Random(SEED)
    whole = bytes(range(100))
    assert sum(values.broken(draw, whole) != whole for _ in range(100)) > 80
    assert all(isinstance(values.packed(draw, {"a": [1, {"b": 2}]}), bytes) for _ in range(200))


@pytest.mark.parametrize(("bytes_a_case", "expected"), [(0, 0.0), (5, 5000.0)])
def test_growth_is_that_of_the_last_half(bytes_a_case: int, expected: float) -> None:
    """What a process takes at the beginning does not count."""
    memory = [(cases, 10**6 * min(cases, 400) + bytes_a_case * cases, 20) for cases in range(0, 1000, 10)]
    assert growth_a_thousand_cases(memory) == pytest.approx(expected)
