from __future__ import annotations

import random

from corpus.duplicates import NearDuplicates, shingles


def _words(seed: int, count: int = 120) -> list[str]:
    source = random.Random(seed)
    return [str(source.randrange(10**6)) for _ in range(count)]


def test_new_texts_are_kept_and_repeated_ones_are_not() -> None:
    seen = NearDuplicates(log2_bits=20)
    texts = [" ".join(_words(seed)) for seed in range(50)]
    assert all(seen.add(text) for text in texts)
    assert not any(seen.add(text.upper() + "\n") for text in texts)


def test_half_known_is_kept_and_more_than_half_is_not() -> None:
    seen = NearDuplicates(log2_bits=20)
    known = _words(0)
    assert seen.add(" ".join(known))
    assert seen.add(" ".join(known[:60] + _words(1, 60)))
    assert not seen.add(" ".join(known[:80] + _words(2, 40)))


def test_a_refused_text_is_not_remembered() -> None:
    seen = NearDuplicates(log2_bits=20)
    known, tail = _words(0, 100), _words(1, 60)
    assert seen.add(" ".join(known))
    assert not seen.add(" ".join(known + tail))
    assert seen.add(" ".join(tail))


def test_short_texts_are_one_shingle() -> None:
    assert shingles("two words").size == shingles("").size == 1
    assert shingles("a b c d e f g h").size == 1
    assert shingles("a b c d e f g h i").size == 2


def test_memory_does_not_grow_and_the_oldest_are_forgotten() -> None:
    seen = NearDuplicates(log2_bits=14)
    sizes = [bits.size for bits in seen._filters]
    first = " ".join(_words(0))
    assert seen.add(first)
    for seed in range(1, 40):
        seen.add(" ".join(_words(seed)))
    assert [bits.size for bits in seen._filters] == sizes
    assert seen.add(first)


def test_false_alarms_are_rare_when_full() -> None:
    seen = NearDuplicates(log2_bits=16)
    assert sum(seen.add(" ".join(_words(seed))) for seed in range(300)) == 300
