"""Gives memory that is free back to the system.

glibc keeps pages that lie between what is in use; after many large messages they add up, whatever was freed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes

PERIOD_S = 30.0


def give_back() -> bool:
    """Return free pages, by malloc_trim(3); False where the C library has none."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
        return True
    return False


async def keep_giving_back() -> None:
    """Now and then for ever, off the event loop."""
    while await asyncio.to_thread(give_back):
        await asyncio.sleep(PERIOD_S)
