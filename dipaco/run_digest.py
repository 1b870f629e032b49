"""One hash of a run: of all module weights, or of everything that a continuation depends on and that was counted."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from coordinator.snapshot import RunSnapshot
from model import digest


def run_digest(snapshot: RunSnapshot, *, everything: bool) -> str:
    """The digest of the newest version of every module of every model, read module by module.

    With `everything`, also outer and inner states, the router, shard manifests, best versions, and the token and loss
    sums of every task: a run that was disturbed must agree with an undisturbed one in this.
    """
    weights = digest.run_digest(
        (f"{model}/{module_id}", version, digest.module_digest(path))
        for model in snapshot.models()
        for module_id, (version, path) in snapshot.modules(model).items()
    )
    return (
        hashlib.sha256(json.dumps([weights, _beside_weights(snapshot)]).encode()).hexdigest() if everything else weights
    )


def _beside_weights(snapshot: RunSnapshot) -> dict[str, Any]:
    state, router = snapshot.state, snapshot.router_path
    best = {
        key: [row.phase, repr(row.loss_sum), row.tokens, [(each.module_id, each.blob.digest) for each in row.modules]]
        for key, row in sorted(state.best.items())
    }
    return {
        **({"best": best} if best else {}),
        "outer": {key: row.momentum.digest if row.momentum else "" for key, row in sorted(state.modules.items())},
        "inner": {key: row.inner_state.digest if row.inner_state else "" for key, row in sorted(state.shards.items())},
        "manifests": {key: row.manifest.digest if row.manifest else "" for key, row in sorted(state.shards.items())},
        "router": router.name if router else "",
        "tasks": sorted(
            (metric["task_id"], metric["tokens"], metric["steps"], repr(metric["loss_sum"]))
            for metric in snapshot.metrics
        ),
    }
