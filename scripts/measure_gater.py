"""What labels are worth to a gater: cross-validation on the router split of a finished run.

Scores the router sequences under every path of the run (as its `gater` stage does), fits gaters to four fifths of them
and routes the last fifth, in turn. Perplexity is of the sequences under the path that each gets, beside that of the
router which divided the training data, and of the best path of every sequence. Folds are runs of documents: sequences
of one document are on one side nearly always.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configs.stages import GaterConfig  # noqa: E402
from coordinator.snapshot import RunSnapshot  # noqa: E402
from coordinator.stage_tasks import featurize_tasks, score_tasks  # noqa: E402
from dipaco.local_tasks import LocalTasks  # noqa: E402
from model.store import BlobStore  # noqa: E402
from protocol.tasks import EvaluateSpec, FeaturizeSpec, parse_spec  # noqa: E402
from routing.frozen import read_router  # noqa: E402
from routing.gating import fit_gater  # noqa: E402
from routing.records import Features, Losses  # noqa: E402

FOLDS, RUN_LENGTH = 5, 24
KINDS: dict[str, dict[str, Any]] = {
    "capped and matched": {},
    "capped": {"match_labels": False},
    "best path": {"capacity": None, "match_labels": False},
    **{f"soft, {t:g} nats": {"capacity": None, "match_labels": False, "temperature": t} for t in (10.0, 30.0, 100.0)},
}
Table = npt.NDArray[Any]


def scored(snapshot: RunSnapshot, max_sequences: int | None) -> tuple[Table, Table, Table, Table]:
    """Ids (N), features (N, D), losses (N, P; nats) and counted targets (N) of the router sequences."""
    plan, state, paths = snapshot.plan, snapshot.state, snapshot.topology.num_paths
    ids, features, losses, counts = [], [], [], []
    with tempfile.TemporaryDirectory(prefix="dipaco-gater-") as scratch:
        local = LocalTasks(snapshot, BlobStore(Path(scratch)))
        whole = plan.experiment.model.sequence_length
        by_file: dict[str, list[Losses]] = {}
        for done, task in enumerate(score_tasks(plan, state, "gater", chunk_tokens=whole, max_sequences=max_sequences)):
            spec = parse_spec(task.spec)
            assert isinstance(spec, EvaluateSpec)
            by_file.setdefault(task.subject.partition("-")[2], []).append(
                Losses.from_bytes(local.output(spec, "losses"))
            )
            print(f"scored by {done + 1} of {paths * len(plan.ranges(state, 'router'))} paths", file=sys.stderr)
        for task in featurize_tasks(plan, state, "gater", "sample", "router", sample_share=1.0):
            spec = parse_spec(task.spec)
            assert isinstance(spec, FeaturizeSpec)
            found = Features.from_bytes(local.output(spec, "features"))
            records = by_file[task.subject.rpartition("-")[2]]
            positions = records[0].positions
            ids.append(found.ids[positions])
            features.append(found.z[positions])
            losses.append(np.stack([record.loss.sum(axis=1) for record in records], axis=1))
            counts.append(records[0].count.sum(axis=1))
    return np.concatenate(ids), np.concatenate(features), np.concatenate(losses), np.concatenate(counts)


def measured(run_dir: Path, max_sequences: int | None) -> dict[str, Any]:
    """Perplexities by kind of label; `sequences` and `router` (that of the shards) beside them."""
    snapshot = RunSnapshot.open(run_dir)
    ids, z, losses, counts = scored(snapshot, max_sequences)
    folds = np.empty(len(ids), np.int64)
    folds[np.argsort(ids)] = np.arange(len(ids)) // RUN_LENGTH % FOLDS

    def perplexity(paths: Table) -> float:
        return float(np.exp(np.take_along_axis(losses, paths[:, None], axis=1).sum() / counts.sum()))

    found = {}
    for name, changes in KINDS.items():
        config, chosen = GaterConfig(**changes), np.empty(len(ids), np.int64)
        for fold in range(FOLDS):
            train = folds != fold
            fitted = fit_gater(
                ids[train], z[train], losses[train], config, snapshot.config.experiment.sharding.prefix_tokens
            )
            chosen[~train] = fitted.gater.paths(z[~train])
        found[name] = perplexity(chosen)
    divided = snapshot.state.stages["shard"].result.get("router")
    router = None if divided is None else read_router(snapshot.store.path(divided[0]).read_bytes())
    return {
        "run": str(run_dir),
        "sequences": len(ids),
        "router of the shards": None if router is None else perplexity(router.paths(z)),
        **found,
        "best path of every sequence": perplexity(losses.argmin(axis=1)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory of a finished mixture with a router split")
    parser.add_argument("--max-sequences", type=int, help="of each token file of the router split; all by default")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    result = measured(given.run, given.max_sequences)
    if given.json:
        print(json.dumps(result, indent=1))
    else:
        for name, value in result.items():
            print(f"{name:30} {value:.2f}" if isinstance(value, float) else f"{name:30} {value}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
