"""A table of the experiment as a document, and measurements made up by hand."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from scripts.experiment_measurement import Measurement

REPOSITORY = Path(__file__).resolve().parents[2]
ONE_PATH = {"levels": [{"modules": 1, "blocks": [0, 1], "embedding": True, "head": True}]}
DENSE = {"topology": ONE_PATH, "sharding": {"kind": "all", "prefix_tokens": 16}, "outer": {"kind": "assign"}}
Document = dict[str, Any]


def tiny_table() -> Document:
    """A table over the experiment of configs/tests/tiny.yaml: 2x2, dense, and two variants to choose between."""
    tiny = yaml.safe_load((REPOSITORY / "configs" / "tests" / "tiny.yaml").read_text(encoding="utf-8"))
    experiment = tiny["experiment"]
    del experiment["baselines"], experiment["evaluation"]["routes"], experiment["seed"]
    experiment["stages"] = [stage for stage in experiment["stages"] if stage["kind"] != "evaluate"]
    return {
        "title": "Tiny",
        "levels": "2x2",
        "experiment": experiment,
        "seeds": [0, 1],
        "routes": ["sequence", "every:16", "every:32", "oracle:sequence"],
        "reference": "dense",
        "rows": [
            {"name": "dense", "label": "dense", "compute": "1x", "tuned_as": "dense", "overrides": deepcopy(DENSE)},
            {"name": "kmeans", "label": "k-means", "compute": "4x", "tuned_as": "dipaco"},
            {
                "name": "product",
                "label": "product k-means",
                "compute": "4x",
                "tuned_as": "dipaco",
                "overrides": {"sharding.kind": "product-kmeans"},
            },
        ],
        "tune": {
            "learning_rates": [1.0e-3, 3.0e-3],
            "seed": 0,
            "choices": {"dense": "dense", "dipaco": "kmeans"},
        },
        "budgets": {"double": {"pretrain": 2, "phases": 2}},
        "headline": {
            "candidates": ["kmeans", "product"],
            "routes": ["every:16", "every:32"],
            "references": ["dense"],
            "seeds": [0, 1, 2],
            "budgets": ["double"],
            "budget_seeds": [0],
        },
        "cost": {"step_s": 0.1, "assign_s": 2, "other_s": 5},
    }


def measured(validation: dict[str, float], test: dict[str, float] | None = None, **run: Any) -> Measurement:
    """A finished run of a mixture with these perplexities by route."""
    found = {
        split: {
            "asked": sorted(by_route),
            "perplexity": {"dipaco": by_route},
            "bits_per_byte": {"dipaco": {route: value / 10 for route, value in by_route.items()}},
            "path_load": {"sequence": {"0.0": 0.1, "0.1": 0.3, "1.0": 0.3, "1.1": 0.3}},
        }
        for split, by_route in (("validation", validation), ("test", test))
        if by_route is not None
    }
    described = {
        "tokens": {"dipaco": 1000},
        "parameters": 40,
        "path_parameters": 20,
        "shards": [0.25, 0.25, 0.2, 0.3],
        "wire_bytes": {"modules": 60, "outer_gradients": 30, "inner_state": 10, "other": 1000},
        "every_step_bytes": 400,
        "wall_s": 1.0,
        "config_digest": "c" * 64,
        "digest": "d" * 64,
        "hardware": {"processor": "x", "cores": 2, "memory_gb": 4.0, "system": "Linux x86_64", "python": "3.12.1"},
    }
    return Measurement({**described, **run}, found)


def unmeasured(digest: str) -> Measurement | None:
    """What is known of a run before any was started."""
    del digest
    return None
