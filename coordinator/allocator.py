"""Keeps a coordinator from growing by what it has freed: glibc, as it is set, holds on to the room of large messages.

Every thread allocates from an arena of its own, and once a large buffer was freed, later ones of its size come from an
arena, too, where a small neighbour that lives on keeps their pages. With few arenas and a fixed threshold a large
buffer is a mapping of its own, and leaves with its last use (mallopt(3)).
"""

from __future__ import annotations

import contextlib
import ctypes

ARENAS = 2
LARGE_BYTES = 128 * 1024
# Of malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8


def give_back_large_buffers() -> bool:
    """Set it for this process, before it has threads; False where the C library knows none of it."""
    settings = ((_ARENA_MAX, ARENAS), (_MMAP_THRESHOLD, LARGE_BYTES), (_TRIM_THRESHOLD, LARGE_BYTES))
    with contextlib.suppress(AttributeError, OSError, TypeError):
        library = ctypes.CDLL(None)
        accepted = [library.mallopt(parameter, value) == 1 for parameter, value in settings]
        return all(accepted)
    return False
