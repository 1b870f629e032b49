"""A process of `dipaco run` leaves when the one that started it is gone: none stays behind and holds the run."""

from __future__ import annotations

import os
import signal
import threading
import time

_PERIOD_S = 1.0


def stop_without(parent: int) -> None:
    """From now on, end this process in its orderly way (SIGTERM) once its parent is no longer `parent`."""
    threading.Thread(target=_watch, args=(parent,), name="parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_PERIOD_S)
    os.kill(os.getpid(), signal.SIGTERM)
