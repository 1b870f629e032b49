"""Results of tasks that were computed here before: a task is a pure function, so its outputs are as good as new.

A task is known by what decides its bits: its spec (blobs by digest), the parts of the configuration that its kind
reads, the numerics version and the fingerprint class of the machine. Runs that share a beginning share its results.
Only what has counted is kept; whether it is right a memo cannot tell, so a task that is leased again is computed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from configs.load import NUMERICS_VERSION
from configs.schema import Experiment
from protocol.tasks import BlobRef, FeaturizeSpec, PackSpec, TaskResult, TrainSpec
from worker.cache import BlobCache
from worker.outcome import TaskOutcome
from worker.task import AnySpec
from worker.task_path import MIXTURE

FORMAT = 1


def memo_key(spec: AnySpec, experiment: Experiment, fingerprint: str) -> str | None:
    """SHA-256 of what decides the outputs of a task; None for one that goes on from somebody's checkpoint."""
    if isinstance(spec, TrainSpec) and spec.resume is not None:
        return None
    content = {
        "format": FORMAT,
        "numerics": NUMERICS_VERSION,
        "fingerprint": fingerprint,
        "spec": spec.model_dump(mode="json", exclude={"required_bytes"}),
        "experiment": decisive(spec, experiment),
    }
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def decisive(spec: AnySpec, experiment: Experiment) -> dict[str, Any]:
    """What a task reads of the configuration, beside its spec."""
    if isinstance(spec, PackSpec):
        return {"sequence_length": experiment.model.sequence_length}
    model = (spec.base if isinstance(spec, FeaturizeSpec) else spec.path).model
    topology = experiment.topology
    levels = [level.model_dump(mode="json") for level in topology.levels]
    if model != MIXTURE:  # one path of the mixture's levels, whatever modules they offer
        levels = [{**level, "modules": 1} for level in levels]
    found: dict[str, Any] = {"model": experiment.model.model_dump(mode="json"), "levels": levels}
    if isinstance(spec, FeaturizeSpec) and spec.mode == "look":
        found["paths"] = topology.num_paths
    if isinstance(spec, TrainSpec):
        found["inner"] = experiment.inner.model_dump(mode="json")
        found["prefix_tokens"] = experiment.sharding.prefix_tokens
        found["first_phase"] = experiment.first_phase(spec.phase) if model == MIXTURE else 0
        found["paths"] = topology.num_paths if spec.objective == "router" else 0
    return found


class Memo:
    """The results in one folder, which worker processes may share; those used longest ago go first."""

    def __init__(self, root: Path, limit_bytes: int) -> None:
        self._results = root / "results"
        self._results.mkdir(parents=True, exist_ok=True)
        self._blobs = BlobCache(root, limit_bytes)

    def recall(self, key: str, into: Path) -> TaskOutcome | None:
        """The outcome, its files in `into`, a directory of their own: they are to be read, never written.

        None where the result, or a part of it, is not here any more or cannot be had.
        """
        entry = self._results / key
        try:
            result = TaskResult.model_validate_json(entry.read_bytes())
            held = {name: self._held(blob) for name, blob in result.outputs.items()}
            if None in held.values():
                raise FileNotFoundError(entry)
            into.mkdir()
            files = {name: _linked(path, into / name) for name, path in held.items() if path is not None}
        except (OSError, ValueError):  # among them what pydantic and a cache without room raise
            with suppress(OSError):
                entry.unlink(missing_ok=True)
                shutil.rmtree(into, ignore_errors=True)
            return None
        finally:
            self._blobs.release_all()
        return TaskOutcome(files, result.model_copy(update={"reused": True}))

    def remember(self, key: str, outcome: TaskOutcome) -> None:
        """Keep what was computed and has counted, if there is room; the files of the outcome stay where they are."""
        if outcome.result.resumed_steps:
            return
        with suppress(OSError, ValueError):
            scratch = self._blobs.scratch()
            try:
                copies = {name: _linked(path, scratch / name) for name, path in outcome.files.items()}
                for name, copy in copies.items():
                    self._blobs.adopt(copy, outcome.result.outputs[name])
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
            own = Path(tempfile.mkdtemp(dir=self._results))  # another worker may remember the same task now
            try:
                (own / key).write_text(outcome.result.model_dump_json() + "\n", encoding="utf-8")
                os.replace(own / key, self._results / key)
            finally:
                shutil.rmtree(own, ignore_errors=True)

    def _held(self, blob: BlobRef) -> Path | None:
        """Its file, verified; None where it is not here."""
        return self._blobs.hold(blob, _absent)[0] if self._blobs.has(blob.digest) else None


def _absent(digest: str, path: Path) -> int:
    raise FileNotFoundError(digest)


def _linked(source: Path, target: Path) -> Path:
    """The same bytes under another name: by a link where the file system has them."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    return target
