from __future__ import annotations

import random

from corpus.sample import TextSample


def test_the_sample_is_bounded_and_does_not_depend_on_the_order() -> None:
    texts = [f"text {number} " * (number % 7 + 1) for number in range(500)]
    samples = []
    for seed in range(3):
        shuffled = random.Random(seed).sample(texts, len(texts))
        sample = TextSample(2_000)
        for text in shuffled:
            sample.add(text)
        samples.append(sample.texts())
    assert samples[0] == samples[1] == samples[2]
    assert 1_500 < sum(map(len, samples[0])) <= 2_000


def test_one_text_is_kept_even_when_it_is_too_long() -> None:
    sample = TextSample(3)
    sample.add("longer than three")
    assert sample.texts() == ["longer than three"]
