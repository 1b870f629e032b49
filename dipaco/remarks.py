"""What a command is at, on standard error: a line that changes on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PERIOD_S = 10.0


@contextmanager
def remarks(first: str) -> Iterator[Callable[[str], None]]:
    """Gives what to call with every remark; `first` stands there at the beginning."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.markup import escape

        with Console(stderr=True).status(escape(first)) as status:
            yield lambda line: status.update(escape(line))
        return
    said_s = time.monotonic()

    def say(line: str) -> None:
        nonlocal said_s
        if time.monotonic() - said_s >= PERIOD_S:
            said_s = time.monotonic()
            print(line, file=sys.stderr, flush=True)

    yield say
