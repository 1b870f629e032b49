"""The routers of a run, from its directory, on the CPU: that of the features with its base LM, and the router LM.

Legend: N sequences, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Float32

from coordinator.plan import ROUTER, ROUTING
from coordinator.snapshot import RunSnapshot
from dipaco.ending import Refused
from inference.module_cache import verify_module
from model.path import load_path
from model.transformer import PathModel
from routing.features import features_of
from routing.frozen import FrozenRouter, read_router
from routing.router import RouterLM

_SLICE_SEQUENCES = 256


@dataclass(frozen=True, slots=True)
class RunRouter:
    """The newest frozen router of a run, and its base."""

    base: PathModel
    frozen: FrozenRouter

    def features(
        self, prefixes: Sequence[npt.NDArray[Any]], progress: Callable[[int], None] = lambda done: None
    ) -> Float32[np.ndarray, "N D"]:
        """z of prefixes, BOS first; `progress` hears how many are done."""
        parts = [np.zeros((0, self.base.config.hidden_size), np.float32)]
        for start in range(0, len(prefixes), _SLICE_SEQUENCES):
            parts.append(features_of(self.base, prefixes[start : start + _SLICE_SEQUENCES]))
            progress(start + len(parts[-1]))
        return np.concatenate(parts)


def open_router(snapshot: RunSnapshot) -> RunRouter:
    """The router by which the run's shards are as they are, and new text is routed.

    Raises Refused where the run has none, RunUnusable before its base is trained, DamagedModule, MalformedRecord.
    """
    _refuse_without(snapshot)
    assert snapshot.router_path is not None
    frozen = read_router(snapshot.router_path.read_bytes())
    files = {module_id: path for module_id, (_, path) in snapshot.base_modules().items()}
    for module_id, path in files.items():
        verify_module(snapshot.store, module_id, path.name)
    base = load_path(snapshot.config.experiment.model, snapshot.vocab_size, snapshot.plan.dense, files)
    return RunRouter(base.eval().requires_grad_(False), frozen)


def open_router_lm(snapshot: RunSnapshot) -> RouterLM:
    """The router LM of a run. Raises Refused where the run has none that is trained, DamagedModule."""
    refuse_without_router_lm(snapshot)
    files = {module_id: path for module_id, (_, path) in snapshot.modules(ROUTER).items()}
    for module_id, path in files.items():
        verify_module(snapshot.store, module_id, path.name)
    model = load_path(snapshot.config.experiment.model, snapshot.vocab_size, snapshot.plan.dense, files)
    version = " ".join(files[module_id].name for module_id in sorted(files))
    return RouterLM(model.eval().requires_grad_(False), snapshot.topology.num_paths, version)


def refuse_without_router_lm(snapshot: RunSnapshot) -> None:
    """Raises Refused where the run has no router LM that is trained."""
    stage = snapshot.state.stages.get(ROUTER)
    if stage is None or stage.status != "done":
        why = "let the run go on first" if stage else "its stages have no router"
        raise Refused(f"routes router:W need a trained router LM, which this run has not: {why}")


def _refuse_without(snapshot: RunSnapshot) -> None:
    if snapshot.topology.num_paths == 1:
        raise Refused("this run has one path: there is nothing to route")
    if snapshot.router_path is not None:
        return
    if any(stage.kind in ROUTING and stage.status != "done" for stage in snapshot.state.stages.values()):
        raise Refused("this run has no router yet: its sharding is not done; let the run go on first")
    raise Refused("this run has no router: its shards are random, so no text belongs to one path rather than another")
