"""A directory for the outputs of one worker process, beside its cache; what killed processes left is removed."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path


class Workspace:
    """Directories for tasks, under a lock that ends with the process."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self._remove_abandoned(root)
        self._own = Path(tempfile.mkdtemp(prefix="worker-", dir=root))
        self._descriptor = os.open(self._own, os.O_RDONLY)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def directory(self) -> Path:
        """A new, empty directory."""
        return Path(tempfile.mkdtemp(dir=self._own))

    def close(self) -> None:
        """Remove everything."""
        shutil.rmtree(self._own, ignore_errors=True)
        os.close(self._descriptor)

    @staticmethod
    def _remove_abandoned(root: Path) -> None:
        for directory in root.iterdir():
            # Gone, or locked by the process that uses it.
            with suppress(FileNotFoundError, BlockingIOError):
                descriptor = os.open(directory, os.O_RDONLY)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(directory, ignore_errors=True)
                finally:
                    os.close(descriptor)
