"""The inner learning rate: a pure function of the path's step counter.

Linear warm-up, then one cosine over the whole run (DiPaCo, 2403.10616, Sec 4), however it is cut into tasks. The router
LM is fine-tuned without warm-up (Sec 7.2.2).
"""

from __future__ import annotations

import math

from configs.schema import InnerConfig


def learning_rate(inner: InnerConfig, step: int, total_steps: int, fork_step: int | None = None) -> float:
    """The rate of the step with counter `step` (from 0) of `total_steps`.

    Step 0 already takes 1 / warmup_steps of the rate; the cosine ends at final_learning_rate_ratio when the counter
    reaches `total_steps` and stays there. `fork_step`: the counter where the path got its data (fork, re-shard), where
    rewarming begins.
    """
    if step < inner.warmup_steps:
        rate = inner.learning_rate * (step + 1) / inner.warmup_steps
    else:
        rate = inner.learning_rate * _cosine(inner, step, total_steps)
    if fork_step is not None and fork_step <= step < fork_step + inner.rewarm_steps:
        rate *= (step - fork_step + 1) / inner.rewarm_steps
    return rate


def router_learning_rate(inner: InnerConfig, step: int, total_steps: int) -> float:
    """The same for the router LM, by a counter of its own: from the full rate at step 0 to 0 at `total_steps`."""
    return inner.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / total_steps)))


def _cosine(inner: InnerConfig, step: int, total_steps: int) -> float:
    """From 1 after the warm-up to the final ratio at `total_steps`."""
    horizon = max(1, total_steps - inner.warmup_steps)
    done = min(1.0, (step - inner.warmup_steps) / horizon)
    floor = inner.final_learning_rate_ratio
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done))
