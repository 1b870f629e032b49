"""How a command ends: its exit codes, and the rule that a person never sees a traceback for a mistake of theirs.

An exception declared in one of our packages is such a mistake (or a refusal), and its message is the sentence to print;
so is trouble with a file. Anything else is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dipaco.shadows import PACKAGES

DONE = 0
WRONG = 1
"""Something was refused or failed; one sentence on standard error says what."""
USAGE = 2
"""The command line itself was wrong (also the code of the argument parser)."""
UNFINISHED = 3
"""The run stopped before its end and continues when it is started again."""
INTERRUPTED = 130
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class Refused(ValueError):
    """A command cannot do what was asked; the message says why and what to do."""


def sentence(error: BaseException) -> str | None:
    """What to tell the person, or None where the error is a bug that deserves its traceback."""
    if type(error).__module__.partition(".")[0] in PACKAGES:
        return str(error.strerror or error) if isinstance(error, OSError) else str(error)
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        where = f" ({error.filename})" if error.filename else ""
        then = "; make room and give the same command again: a run continues where it was"
        return f"{error.strerror or error}{where}" + (then if error.errno in NO_ROOM else "")
    return None


@contextmanager
def no_room_at(path: Path) -> Iterator[None]:
    """Name the path where a disk is full: the system does so when a file is opened, not when it is written."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM and error.filename is None:
            error.filename = str(path)
        raise


def say_wrong(message: str) -> None:
    """One line on standard error."""
    with suppress(OSError):  # the exit code says it, too
        print(f"dipaco: {' '.join(message.split())}", file=sys.stderr, flush=True)
