"""Claims that differ, kept for a person: RUN/evidence/<task>/evidence.json, and beside it both results of a ban.

Written before the decision that it supports, so that a ban never lacks it; how far the results are apart is computed
afterwards. The files are links to blobs, which outlive them in the store.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.decisions import Dispute
from coordinator.outer import squared_norm
from coordinator.partial_sum import CHUNK_ELEMENTS, FlatFile, chunk_spans
from coordinator.state import Claim
from model import tensor_file
from model.layout import TensorSpec
from model.store import BlobStore, fsync_path, write_whole

EVIDENCE = "evidence"
# Ends the name of a file that is not whole yet.
ASIDE = ".new"
TENSORS = ".safetensors"


def keep_evidence(run_dir: Path, store: BlobStore, dispute: Dispute) -> Path:
    """Write what is known of a dispute, durably; repeating it changes nothing. Returns the directory."""
    folder = evidence_dir(run_dir, dispute.task_id)
    folder.mkdir(parents=True, exist_ok=True)
    if dispute.banned:
        for claim in dispute.claims:
            for output, ref in claim.outputs.items():
                _link(store.path(ref.digest), _file(folder, claim, output))
    _write(folder, _record(dispute))
    fsync_path(folder.parent)
    return folder


def evidence_dir(run_dir: Path, task_id: str) -> Path:
    return run_dir / EVIDENCE / task_id.replace("/", "-")


def measure_evidence(folder: Path, dispute: Dispute) -> None:
    """Add to the evidence of a ban how far each output of a banned worker is from the one that counts, if it can."""
    with contextlib.suppress(OSError, ValueError):  # evidence that somebody moved away disturbs no run
        _measure(folder, dispute)


def _measure(folder: Path, dispute: Dispute) -> None:
    counted = next(claim for claim in dispute.claims if claim.fence == dispute.counted)
    record = _record(dispute)
    for claim, entry in zip(dispute.claims, record["claims"], strict=True):
        if claim.fence in dispute.banned:
            entry["differences"] = {
                output: difference(_file(folder, counted, output), _file(folder, claim, output))
                for output in sorted(claim.outputs)
            }
    _write(folder, record)


def difference(one: Path, other: Path) -> dict[str, float]:
    """The largest absolute difference of two tensor files of the same tensors, and the L2 norm of all of them."""
    largest, squares = 0.0, 0.0
    for chunk in _differences(one, other):
        largest = max(largest, float(np.max(np.abs(chunk), initial=0.0)))
        squares += squared_norm(chunk)
    return {"max": largest, "norm": math.sqrt(squares)}


def _differences(one: Path, other: Path) -> Iterator[Any]:
    specs = [TensorSpec(name, shape) for name, shape in sorted(tensor_file.shapes(one).items())]
    left, right = FlatFile(one, specs), FlatFile(other, specs)
    for span in chunk_spans(tensor_file.num_elements(specs), CHUNK_ELEMENTS):
        yield left.read(*span) - right.read(*span)


def _record(dispute: Dispute) -> dict[str, Any]:
    return {
        "task_id": dispute.task_id,
        "note": dispute.note,
        "claims": [_entry(dispute, claim) for claim in dispute.claims],
    }


def _entry(dispute: Dispute, claim: Claim) -> dict[str, Any]:
    return {
        "identity": claim.identity,
        "worker": claim.worker,
        "fingerprint": claim.fingerprint,
        "fence": claim.fence,
        "wall_s": claim.wall_s,
        "counted": claim.fence == dispute.counted,
        "banned": claim.fence in dispute.banned,
        "outlier": claim.outlier,
        "digests": {output: ref.digest for output, ref in claim.outputs.items()},
        "norms": claim.norms,
        "result": claim.result,
    }


def _file(folder: Path, claim: Claim, output: str) -> Path:
    return folder / f"{claim.fence}-{output}{TENSORS}"


def _link(blob: Path, path: Path) -> None:
    """The same bytes under another name, which appears with all of them; copied where the file system has no links."""
    aside = path.with_name(f"{path.name}{ASIDE}")
    aside.unlink(missing_ok=True)
    try:
        os.link(blob, aside)
    except OSError:
        shutil.copyfile(blob, aside)
        fsync_path(aside)
    os.replace(aside, path)
    aside.unlink(missing_ok=True)  # where both were the same file, which a rename leaves as it is


def _write(folder: Path, record: dict[str, Any]) -> None:
    write_whole(folder / "evidence.json", json.dumps(record, indent=1))
