"""The coordinator's own tasks of `shard`, `reshard` and `gater`: routers, what to score, who gets what.

Legend: N router sequences, P paths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from coordinator.plan import Plan, blob, seed_of
from coordinator.state import State, Task
from coordinator.task_outputs import outputs_of
from corpus.token_file import TokenFile
from model.store import BlobStore
from routing.frozen import FrozenRouter, read_router
from routing.records import Assignments, Features, Losses, evaluated_positions
from routing.sharding import UnusableShards, check_sizes, divide, manifests, merge, random_shards


class ShardingJobs:
    """Runs them for one run. scikit-learn is imported where something is fitted."""

    def __init__(self, plan: Plan, store: BlobStore, say: Callable[[str], None]) -> None:
        self._plan, self._store, self._say = plan, store, say

    def fit(self, task: Task, state: State) -> dict[str, Any]:
        """k-means on the sampled features."""
        from routing.kmeans import fit

        features = self._features(task, state)
        ids, z = np.concatenate([part.ids for part in features]), np.concatenate([part.z for part in features])
        experiment = self._plan.experiment
        clusters = fit(ids, z, experiment.sharding, self._plan.mixture, seed_of(experiment.seed, "router"))
        self._say(f"router: {experiment.sharding.kind} with {clusters.num_shards} shards on {len(z):,} features")
        return {"router": list(self._store.put_bytes(clusters.to_bytes()))}

    def divide(self, task: Task, state: State) -> dict[str, Any]:
        """Which training sequences each shard holds."""
        experiment, num_shards = self._plan.experiment, self._plan.mixture.num_shards
        ids, lengths = self._training_sequences(state)
        router = self._plan.fitted(state, state.stages[task.stage])
        if router is None:
            shards = random_shards(ids, num_shards, seed_of(experiment.seed, "random shards"))
        else:
            assigned = self._assigned(task, state)
            found = merge([assigned[part["index"]] for part in self._parts(state, "train")])
            shards = divide(found, num_shards, experiment.sharding)
        batch_tokens = experiment.inner.batch_rows * experiment.model.sequence_length
        try:
            tokens = check_sizes(shards, ids, lengths, batch_tokens)
        except UnusableShards:
            if state.stages[task.stage].kind != "reshard":
                raise
            # A run that has trained goes on, with shards of equal size: those that it began with were large enough.
            self._say(
                f"{task.stage}: the gater leaves a shard below one batch; all get as many sequences as one another"
            )
            shards = divide(found, num_shards, experiment.sharding.model_copy(update={"capacity": 1.0}))
            tokens = check_sizes(shards, ids, lengths, batch_tokens)
        self._say(f"shards hold {_percent([held / sum(tokens) for held in tokens])} % of the tokens")
        version = "" if router is None else router.digest
        stored = [self._store.put_bytes(m.to_bytes()) for m in manifests(shards, version, experiment.sharding.overlap)]
        entries = [
            {"manifest": list(pair), "sequences": len(members), "tokens": held}
            for pair, members, held in zip(stored, shards, tokens, strict=True)
        ]
        if router is None or experiment.early_stopping is None:
            return {"shards": entries}
        return {"shards": entries, "stop": self._stop_selections(task, state, experiment.early_stopping.max_sequences)}

    def _assigned(self, task: Task, state: State) -> dict[int, Assignments]:
        """What the router has made of each token file, by the index of its range."""
        outputs = outputs_of(self._store, state, task.stage, "FEATURIZE", "assignments")
        return {int(subject.rpartition("-")[2]): Assignments.from_bytes(data) for subject, data in outputs}

    def _stop_selections(self, task: Task, state: State, max_sequences: int | None) -> dict[str, Any]:
        """The positions (uint32) of each path's own sequences in each stop file, by "path-file": the router's choice.

        Sequences that are too short to be evaluated are left out; raises UnusableShards where nothing else is there.
        """
        topology, assigned, selections = self._plan.mixture, self._assigned(task, state), dict[str, Any]()
        for part in self._parts(state, "stop"):
            with TokenFile.open(self._store.path(blob(part["file"]).digest)) as file:
                positions = evaluated_positions(file, max_sequences)
            paths = assigned[part["index"]].shards[positions, 0].astype(np.int64) // topology.replicas
            for path_index in np.unique(paths).tolist():
                stored = self._store.put_bytes(positions[paths == path_index].astype("<u4").tobytes())
                selections[f"{path_index}-{part['index']}"] = list(stored)
        if not selections:
            raise UnusableShards(
                "the stop split has no sequence that is long enough to be measured; raise corpus.splits.stop"
            )
        measured = {int(subject.partition("-")[0]) for subject in selections}
        unmeasured = [topology.path_id(path) for path in range(topology.num_paths) if path not in measured]
        if unmeasured:
            shown = ", ".join(unmeasured[:16]) + (" ..." if len(unmeasured) > 16 else "")
            self._say(f"{task.stage}: no sequence of the stop split is routed to {shown}: its best version is its last")
        return selections

    def select(self, task: Task, state: State) -> dict[str, Any]:
        """The positions (uint32) that each path is scored on in each router file, and what that costs."""
        gated = self._plan.gated(state.stages[task.stage])
        choices = self._candidates(task, state, gated.candidates)
        selections: dict[str, list[Any]] = {}
        scored = 0
        for part, features in zip(self._router_parts(state), self._features(task, state), strict=True):
            with TokenFile.open(self._store.path(blob(part["file"]).digest)) as file:
                positions, lengths = evaluated_positions(file, gated.max_sequences), np.array(file.lengths)
            near = None if choices is None else choices(features.z[positions])
            for path_index in range(self._plan.mixture.num_paths):
                chosen = positions if near is None else positions[(near == path_index).any(axis=1)]
                if len(chosen):
                    stored = self._store.put_bytes(chosen.astype("<u4").tobytes())
                    selections[f"{path_index}-{part['index']}"] = list(stored)
                    scored += int(lengths[chosen].sum(dtype=np.int64))
        if not selections:
            raise UnusableShards(
                "the router split has no sequence that is long enough to be scored; raise corpus.splits.router"
            )
        worth = self._phases_worth(scored)
        self._say(f"{task.stage}: scoring {scored:,} tokens, which computes as much as {worth:.2f} phases")
        return {"selections": selections, "scored_tokens": scored}

    def _candidates(
        self, task: Task, state: State, candidates: int | None
    ) -> Callable[[npt.NDArray[Any]], npt.NDArray[np.int64]] | None:
        """What names the nearest paths (N, candidates) of features, by the router so far; None: all paths."""
        former = self._former(state)
        if candidates is None or former is None:
            return None
        return lambda z: former.nearest(z, candidates)[0]

    def _phases_worth(self, tokens: int) -> float:
        """Scoring is a forward pass: a third of what a step costs (Kaplan et al., arXiv 2001.08361, Sec 2.1)."""
        experiment = self._plan.experiment
        batch_tokens = experiment.inner.batch_rows * experiment.model.sequence_length
        return tokens / 3 / (batch_tokens * experiment.inner_steps * self._plan.mixture.num_shards)

    def gate(self, task: Task, state: State) -> dict[str, Any]:
        """The gater, fitted to the paths under which the router sequences have the lowest loss."""
        from routing.gating import fit_gater

        experiment, stage = self._plan.experiment, state.stages[task.stage]
        ids, z, losses = self._scored(task, state)
        fitted = fit_gater(ids, z, losses, self._plan.gated(stage).gater, experiment.sharding.prefix_tokens)
        found: dict[str, Any] = {
            "sequences": len(ids),
            "best_shares": fitted.best_shares.tolist(),
            "label_shares": fitted.label_shares.tolist(),
            "gater_shares": fitted.gater_shares.tolist(),
            "agreement": fitted.agreement_with_labels,
            "best_agreement": fitted.agreement_with_best,
            "best_loss": fitted.best_loss,
            "label_loss": fitted.label_loss,
            "gater_loss": fitted.gater_loss,
            "former_loss": self._former_loss(state, z, losses),
        }
        self._say(
            f"{task.stage}: gater on {len(ids):,} sequences; labels {_percent(found['label_shares'])} %, "
            f"gater {_percent(found['gater_shares'])} %, agreement {100 * fitted.agreement_with_labels:.0f} %"
        )
        if not fitted.converged:
            self._say(
                f"{task.stage}: the gater's regression has not converged; raise {stage.kind}.gater.regularization"
            )
        return {"router": list(self._store.put_bytes(fitted.gater.to_bytes())), "gater": found}

    def _former_loss(self, state: State, z: npt.NDArray[np.float32], losses: npt.NDArray[np.float64]) -> float | None:
        """Mean nats of the router sequences under the router so far, of those that its choice was scored for."""
        former = self._former(state)
        if former is None:
            return None
        chosen = np.take_along_axis(losses, former.paths(z)[:, None], axis=1)
        scored = chosen[np.isfinite(chosen)]
        return float(scored.mean()) if len(scored) else None

    def _former(self, state: State) -> FrozenRouter | None:
        """The router so far."""
        router = self._plan.router(state)
        return None if router is None else read_router(self._store.path(router.digest).read_bytes())

    def _scored(
        self, task: Task, state: State
    ) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.float32], npt.NDArray[np.float64]]:
        """Ids (N), features (N, D) and losses (N, P; inf where a path was not scored) of the router sequences."""
        parts = [str(part["index"]) for part in self._router_parts(state)]
        features = dict(zip(parts, self._features(task, state), strict=True))
        shape = self._plan.mixture.num_paths
        tables = {part: np.full((len(found.ids), shape), np.inf) for part, found in features.items()}
        for subject, data in outputs_of(self._store, state, task.stage, "SCORE", "losses"):  # one record at a time
            path_index, _, part = subject.partition("-")
            record = Losses.from_bytes(data)
            tables[part][record.positions, int(path_index)] = record.loss.sum(axis=1)
        scored = {part: np.isfinite(table).any(axis=1) for part, table in tables.items()}
        return (
            np.concatenate([features[part].ids[scored[part]] for part in parts]),
            np.concatenate([features[part].z[scored[part]] for part in parts]),
            np.concatenate([tables[part][scored[part]] for part in parts]),
        )

    def _router_parts(self, state: State) -> list[dict[str, Any]]:
        return self._parts(state, "router")

    def _parts(self, state: State, split: str) -> list[dict[str, Any]]:
        """The token files of a split that hold anything."""
        return [part for part in self._plan.ranges(state, split) if part["sequences"]]

    def _features(self, task: Task, state: State) -> list[Features]:
        """The features that the stage has collected, in the order of the files."""
        outputs = outputs_of(self._store, state, task.stage, "FEATURIZE", "features")
        return [Features.from_bytes(data) for _, data in outputs]

    def _training_sequences(self, state: State) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint32]]:
        """Ids and lengths of all training sequences, sorted by id."""
        ids, lengths = [], []
        for part in self._plan.ranges(state, "train"):
            with TokenFile.open(self._store.path(blob(part["file"]).digest)) as file:
                ids.append(np.array(file.ids))
                lengths.append(np.array(file.lengths))
        order = np.argsort(np.concatenate(ids), kind="stable")
        return np.concatenate(ids)[order], np.concatenate(lengths)[order]


def _percent(shares: list[float]) -> str:
    shown = ", ".join(f"{100 * share:.1f}" for share in shares[:16])
    return f"{shown}{' ...' if len(shares) > 16 else ''}"
