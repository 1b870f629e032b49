from __future__ import annotations

import numpy as np
import pytest

from inference.sampling import BadSampling, Sampler, Sampling, probabilities

LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(temperature=0.0), [0, 1, 0, 0]),
        (Sampling(temperature=0.5), np.array([1, 16, 4, 9]) / 30),
        (Sampling(top_k=2), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(top_k=100), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(top_p=0.6), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(top_p=1.0), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(top_p=0.01), [0, 1, 0, 0]),
    ],
)
def test_distribution(sampling: Sampling, expected: list[float]) -> None:
    np.testing.assert_allclose(probabilities(LOGITS, sampling), expected, atol=1e-6)


def test_top_p_counts_within_top_k() -> None:
    np.testing.assert_allclose(probabilities(LOGITS, Sampling(top_k=3, top_p=0.7)), [0, 4 / 7, 0, 3 / 7], atol=1e-6)


def test_draws_follow_the_distribution() -> None:
    sampler = Sampler(Sampling(seed=3))
    counts = np.bincount([sampler.choose(LOGITS) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(counts, [0.1, 0.4, 0.2, 0.3], atol=0.03)


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(BadSampling, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]
