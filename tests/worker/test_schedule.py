"""Values of the inner learning rate, worked out by hand."""

from __future__ import annotations

import math

import pytest

from configs.schema import InnerConfig
from worker.schedule import learning_rate

INNER = InnerConfig(learning_rate=1e-3, warmup_steps=10, final_learning_rate_ratio=0.1)


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 1e-4),
        (4, 5e-4),
        (9, 1e-3),
        (10, 1e-3),
        (60, 1e-3 * (0.1 + 0.9 * 0.5)),  # half way through the cosine
        (35, 1e-3 * (0.1 + 0.45 * (1 + math.sqrt(0.5)))),  # a quarter
        (110, 1e-4),
        (500, 1e-4),
    ],
)
def test_warms_up_then_follows_one_cosine(step: int, rate: float) -> None:
    assert learning_rate(INNER, step, total_steps=110) == pytest.approx(rate, rel=1e-12)


def test_never_rises_after_the_warm_up() -> None:
    rates = [learning_rate(INNER, step, 110) for step in range(9, 120)]
    assert rates == sorted(rates, reverse=True)


def test_without_warm_up_and_in_runs_shorter_than_it() -> None:
    assert learning_rate(INNER.model_copy(update={"warmup_steps": 0}), 0, 110) == 1e-3
    assert learning_rate(INNER, 10, total_steps=5) == pytest.approx(1e-3)
    assert learning_rate(INNER, 11, total_steps=5) == pytest.approx(1e-4)


def test_warms_up_again_after_the_fork() -> None:
    inner = INNER.model_copy(update={"rewarm_steps": 4})
    plain = [learning_rate(INNER, step, 110) for step in range(48, 56)]
    rewarmed = [learning_rate(inner, step, 110, fork_step=50) for step in range(48, 56)]
    factors = [after / before for before, after in zip(plain, rewarmed, strict=True)]
    assert factors == pytest.approx([1, 1, 0.25, 0.5, 0.75, 1, 1, 1])
    assert [learning_rate(inner, step, 110) for step in range(48, 56)] == plain
