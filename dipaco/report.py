"""report.json and report.html of a run: what was measured, what it cost, and what identifies it.

Keys: `run`; `perplexity` and `bits_per_byte` {dense, other baselines, dipaco: {route (configs.routes):
number}} on the held-out `split`, the prefix of every sequence left out; `per_domain` {domain: the shape of
perplexity}; `path_load` {route: {path: share of tokens}}; `oracle_agreement`; `route_accuracy` {route: share of tokens
routed as the oracle of the same interval does}; `sharding` {stage: {token_shares
{path: share}, and of a gater label_shares, gater_shares, agreement, ...}}; `early_stopping` {paths, kept_bytes,
versions_per_module} (dipaco/early_stopping.py), `dipaco-best` beside `dipaco` then; `tokens` {trained, evaluated};
`wire_bytes` {modules, outer_gradients, inner_state, checkpoints, other}; `stages` {name: seconds} (they may overlap);
`wall_s`, `peak_rss_mb` (all processes of `dipaco run` together, proportional) and `workers`; `digest` of all weights;
`config_digest`; `hardware`. What a run has not measured is an empty mapping, a number that is none is null.
"""

from __future__ import annotations

import json
from typing import Any

from configs.load import experiment_digest
from coordinator.plan import ROUTER, ROUTING
from coordinator.snapshot import RunSnapshot
from dipaco.asking import plain
from dipaco.curves import MissingExtra, draw, loss_curves
from dipaco.early_stopping import early_stopping_of
from dipaco.evaluation import shaped
from dipaco.report_page import page
from dipaco.run_digest import run_digest
from dipaco.usage import hardware, read_usage
from model.store import write_whole

POINTS = 80
"""Of a whole loss curve; each is a mean over the steps in between."""


def build_report(snapshot: RunSnapshot) -> dict[str, Any]:
    """The report of a run as its directory has it."""
    status, usage = snapshot.status(), read_usage(snapshot.run_dir)
    measured = shaped(snapshot, snapshot.evaluation) if snapshot.evaluation else _nothing_measured()
    corpus = snapshot.corpus
    return plain(
        {
            "run": snapshot.config.name,
            **measured,
            "sharding": sharding_of(snapshot),
            "early_stopping": early_stopping_of(snapshot),
            "tokens": {"trained": status["tokens"], **measured["tokens"]},
            "wire_bytes": status["bytes"],
            "stages": {stage["name"]: round(stage["seconds"], 1) for stage in status["stages"]},
            "wall_s": round(usage.wall_s, 1),
            "peak_rss_mb": round(usage.peak_bytes / 1e6, 1),
            "workers": usage.workers,
            "digest": run_digest(snapshot, everything=False),
            "config_digest": experiment_digest(
                snapshot.config, {"corpus": corpus["digest"], "tokenizer": corpus["tokenizer"][0]}
            ),
            "hardware": hardware(),
        }
    )


def sharding_of(snapshot: RunSnapshot) -> dict[str, dict[str, Any]]:
    """The share of tokens of each path of every stage that divided the sequences, and the numbers of every gater."""
    topology, found = snapshot.topology, {}
    for stage in snapshot.state.stages.values():
        if stage.kind not in ROUTING:
            continue
        gater = stage.result.get("gater", {})
        if stage.result.get("shards"):
            shares: dict[str, float] = {}
            total = sum(entry["tokens"] for entry in stage.result["shards"])
            for shard, entry in enumerate(stage.result["shards"]):
                path_id = topology.path_id(topology.path_of_shard(shard))
                shares[path_id] = shares.get(path_id, 0.0) + entry["tokens"] / total
            found[stage.name] = {"token_shares": shares, **gater}
        elif gater:
            found[stage.name] = dict(gater)
    return found


def _nothing_measured() -> dict[str, Any]:
    return {
        "split": "",
        "perplexity": {},
        "bits_per_byte": {},
        "per_domain": {},
        "path_load": {},
        "tokens": {"evaluated": 0},
    }


def write_report(snapshot: RunSnapshot) -> tuple[dict[str, Any], list[str]]:
    """Write both files into the run directory; returns the report and what the person should know about them."""
    report, remarks = build_report(snapshot), []
    curves_png = None
    try:
        # Not of the router LM: its loss is of paths, not of tokens.
        metrics = [metric for metric in snapshot.metrics if metric["model"] != ROUTER]
        curves_png = draw(loss_curves(metrics, window=max(1, snapshot.config.experiment.total_steps // POINTS)))
    except MissingExtra as error:
        remarks.append(f"report.html is without curves: {error}")
    write_whole(snapshot.run_dir / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    write_whole(snapshot.run_dir / "report.html", page(report, curves_png))
    remarks.append(f"report: {snapshot.run_dir / 'report.html'} and {snapshot.run_dir / 'report.json'}")
    return report, remarks
