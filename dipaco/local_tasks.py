"""Tasks of a run carried out here, on the blobs of its directory and of a store beside it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from coordinator.snapshot import RunSnapshot
from inference.module_cache import verify_module
from model.store import BlobStore
from protocol.tasks import EvaluateSpec, FeaturizeSpec
from worker.outcome import Progress, no_progress
from worker.task import inputs, run_task


class LocalTasks:
    """The same functions as on a worker. A module's bytes are held against their digest when it is first used."""

    def __init__(self, snapshot: RunSnapshot, beside: BlobStore) -> None:
        """`beside`: where blobs are that are not the run's, such as the tokens of another text."""
        self._snapshot, self._beside = snapshot, beside
        self._verified: set[str] = set()

    def output(self, spec: EvaluateSpec | FeaturizeSpec, name: str, progress: Progress = no_progress) -> bytes:
        """Run the task and read one of its outputs; raises DamagedModule, and what the task does."""
        path = spec.base if isinstance(spec, FeaturizeSpec) else spec.path
        for module in path.modules:
            if module.blob.digest not in self._verified:
                verify_module(self._snapshot.store, module.module_id, module.blob.digest)
                self._verified.add(module.blob.digest)
        files = {ref.digest: self._file(ref.digest) for refs in inputs(spec).values() for ref in refs}
        with tempfile.TemporaryDirectory(prefix="dipaco-evaluate-") as scratch:
            outcome = run_task(spec, self._snapshot.config.experiment, files, Path(scratch), progress)
            return outcome.files[name].read_bytes()

    def _file(self, digest: str) -> Path:
        store = self._beside if self._beside.has(digest) else self._snapshot.store
        return store.path(digest)
