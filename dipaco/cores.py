"""The cores that this process may use: fewer than the machine has under taskset, a batch system or a container."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """At least 1; all of the machine where the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
