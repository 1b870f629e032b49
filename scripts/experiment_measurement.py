"""What is known of a finished run of the experiment: its perplexities by split, model and route, and what it cost.

A run whose training diverges never finishes; that it came to no number is what is known of it then.
"""

from __future__ import annotations

import json
import math
import re
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.routes import FIXED
from configs.schema import Experiment
from coordinator.plan import BASE, MIXTURE
from coordinator.snapshot import RunSnapshot
from model.layout import num_parameters
from model.topology import Topology
from scripts.experiment_cloze import FoundCloze
from scripts.experiment_table import DIPACO, MIXTURES, RANDOM, UNROUTED

_FAILED = re.compile(r"task \S+ failed \d+ times \((.+)\)")
_NOT_FINITE = "NonFiniteStep: "
"""What a worker puts before the sentence of a step that was not finite (worker/leased_task.py)."""
UNREADABLE = (ValueError, OSError, sqlite3.Error)
"""What reading a run directory, or what a command wrote, may raise where it is damaged or not there."""


def asked(routes: Iterable[str], experiment: Experiment) -> list[str]:
    """The routes to ask `dipaco evaluate` for, sorted: it knows fixed paths, and no route of a single path."""
    topology = Topology.from_config(experiment.topology)
    names: set[str] = set()
    for route in routes:
        if route == RANDOM:
            names.update(FIXED + topology.path_id(path_index) for path_index in range(topology.num_paths))
        else:
            names.add("sequence" if route == UNROUTED else route)
    return sorted(names)


@dataclass(frozen=True, slots=True)
class Measurement:
    """A finished run: `run` as `describe` gives it, `found` by split as `dipaco evaluate --json` does, its `cloze`.

    `no_number`: why its training has none, empty where it has; of `run` only the `hardware` is known then.
    """

    run: Mapping[str, Any]
    found: Mapping[str, Mapping[str, Any]]
    no_number: str = ""
    cloze: FoundCloze | None = None

    def holds(self, split: str, routes: Iterable[str]) -> bool:
        """Whether all of these routes (in evaluate's own names) were asked for on a split, or have no answer."""
        return bool(self.no_number) or (split in self.found and set(routes) <= set(self.found[split]["asked"]))

    def perplexity(self, split: str, model: str, route: str) -> float | None:
        """None where it was not measured; infinite where what was measured is no number."""
        if self.no_number:
            return math.inf
        values = self._values("perplexity", split, model, route)
        if not values:
            return None
        if any(value is None for value in values):
            return math.inf
        return values[0] if len(values) == 1 else math.exp(sum(math.log(value) for value in values) / len(values))

    def bits_per_byte(self, split: str, model: str, route: str) -> float | None:
        """None where it was not measured or is no number."""
        values = self._values("bits_per_byte", split, model, route)
        return None if not values or None in values else sum(values) / len(values)

    def _values(self, key: str, split: str, model: str, route: str) -> list[Any]:
        """One value; of a route at random the value of every fixed path."""
        if split not in self.found:
            return []
        measured = self.found[split][key].get(model, {})
        if model not in MIXTURES:
            return [measured] if not isinstance(measured, dict) else []
        if route == RANDOM:
            return [value for name, value in measured.items() if name.startswith(FIXED)]
        name = "sequence" if route == UNROUTED else route
        return [measured[name]] if name in measured else []

    def path_load(self, model: str, route: str) -> list[float]:
        """The share of the test tokens that each path predicts under a route; empty where there is no choice."""
        loads = self.found.get("test", {}).get("path_load", {}) if model == DIPACO else {}
        shares = list(loads.get(route, {}).values())
        return shares if len(shares) > 1 else []


def describe(run_dir: Path) -> dict[str, Any]:
    """What a table says of a finished run beside its perplexities; plain JSON.

    Keys: `tokens` {model as evaluations name it: trained tokens, those of the base included}, `path_parameters`,
    `parameters` (of all modules), `shards` [share of the training tokens], `wire_bytes`, `reused_tasks` (of an
    earlier cell, by --reuse), `every_step_bytes` (what an
    exchange of every gradient would have moved: 8 bytes a parameter, inner step and shard), `wall_s`, `config_digest`,
    `digest`, `hardware`.
    """
    snapshot = RunSnapshot.open(run_dir)
    experiment, topology = snapshot.config.experiment, snapshot.topology
    report = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
    trained: dict[str, int] = {}
    steps, reused = 0, 0
    for metric in snapshot.metrics:
        reused += bool(metric.get("reused"))
        if metric["kind"] == "TRAIN":
            trained[metric["model"]] = trained.get(metric["model"], 0) + metric["tokens"]
            steps += metric["steps"]
    base = trained.pop(BASE, 0)
    shards = [shard.training_tokens for shard in snapshot.state.shards_of(MIXTURE)]
    path_parameters = num_parameters(experiment.model, snapshot.vocab_size, topology)
    specs = (snapshot.plan.module_spec(snapshot.state, MIXTURE, module_id) for module_id in topology.module_ids)
    return {
        "tokens": {DIPACO if model == MIXTURE else model: base + count for model, count in trained.items()},
        "path_parameters": path_parameters,
        "parameters": sum(spec.num_elements for spec in specs),
        "shards": [count / sum(shards) for count in shards],
        "wire_bytes": report["wire_bytes"],
        "reused_tasks": reused,
        "every_step_bytes": 8 * path_parameters * steps,
        **{key: report[key] for key in ("wall_s", "config_digest", "digest", "hardware")},
    }


def no_number(run_dir: Path) -> str:
    """Why a run that ended has no number: the sentence of the step that was not finite, empty where it is none.

    Every attempt at the task that paused the run has to say so: what else went wrong may go right the next time.
    """
    try:
        failed = _FAILED.fullmatch(RunSnapshot.open(run_dir).state.standing.paused)
    except UNREADABLE:
        return ""
    reasons = [told.partition(": ")[2] for told in failed[1].split("; ")] if failed else []
    diverged = bool(reasons) and all(reason.startswith(_NOT_FINITE) for reason in reasons)
    return reasons[0].removeprefix(_NOT_FINITE) if diverged else ""
