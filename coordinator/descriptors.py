"""File descriptors: how many connections the coordinator may hold, so that strangers cannot use up those of the run.

The soft limit of open files is raised to the hard one at the start; connections are bounded by what it leaves.
"""

from __future__ import annotations

import sys

# More than anyone needs; a limit beyond it costs time in some systems and buys nothing.
MOST_OPEN_FILES = 65_536
# For the database, logs, steps of modules and what libraries keep.
RESERVED = 128
# Calls at once on one connection: a worker has three, and each may hold a file open.
MAX_STREAMS = 16
_WITHOUT_LIMITS = 8192  # Windows has no limit of this kind to ask for


def raise_open_files(most: int = MOST_OPEN_FILES) -> int:
    """Let this process open as many files as its hard limit allows, up to `most`; returns the limit from now on."""
    if sys.platform == "win32":
        return _WITHOUT_LIMITS
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most if hard == resource.RLIM_INFINITY else min(most, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError):  # some systems refuse what they call their hard limit
            return soft
        return wanted
    return wanted if soft == resource.RLIM_INFINITY else soft


def max_connections(limit: int) -> int:
    """How many connections fit a limit of open files, if each makes all the calls that it may."""
    return max(1, (limit - RESERVED) // (1 + MAX_STREAMS))
