"""The steps of `shard`, `reshard` and `gater`: features, a router, and every training sequence in its shard. Pure.

A re-shard (DiPaCo, arXiv 2403.10616, Sec 2.4.2) scores held-out sequences under every path, fits the gater to the best
ones and divides anew. Modules, outer momentum and the inner state of each path go on; what a shard holds, and the
router that gave it that, change together in the one decision that ends the stage. After the last training a `gater`
stage does the first half of it: inference is routed by what the final paths are best at, and nothing is divided.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from coordinator.plan import BASE, MIXTURE, Plan, blob, seed_of
from coordinator.stage_tasks import featurize_tasks, gather_task, local_result, score_tasks, stage_task
from coordinator.state import Shard, Stage, State, Task

Step = Callable[[State, Stage], list[Task]]


class ShardingSteps:
    """The tasks of the stages that say which sequences belong to which shard."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._experiment = plan, plan.experiment
        divide: tuple[Step, ...] = (self._divide, self._gather)
        fit: dict[str, tuple[Step, ...]] = {"all": (), "random": divide}
        self.shard: tuple[Step, ...] = fit.get(
            plan.experiment.sharding.kind, (self._sample, self._fit, self._assign, *divide)
        )
        self.gater: tuple[Step, ...] = (self._look, self._select, self._score, self._gate)
        self.reshard: tuple[Step, ...] = (*self.gater, self._assign, *divide)

    # --- a router of features, and the shards that follow from it -----------------------------------------------------

    def _sample(self, state: State, stage: Stage) -> list[Task]:
        sequences = sum(part["sequences"] for part in self._plan.ranges(state, "train"))
        share = min(1.0, self._experiment.sharding.sample_sequences / max(1, sequences))
        seed = seed_of(self._experiment.seed, "sample")
        return featurize_tasks(self._plan, state, stage.name, "sample", "train", sample_share=share, seed=seed)

    def _fit(self, state: State, stage: Stage) -> list[Task]:
        return [stage_task(stage.name, "FIT", "router")]

    def _assign(self, state: State, stage: Stage) -> list[Task]:
        router, top_n = self._plan.fitted(state, stage), self._top_n(stage)
        tasks = featurize_tasks(self._plan, state, stage.name, "assign", "train", router=router, top_n=top_n)
        if self._experiment.early_stopping is not None:
            tasks += featurize_tasks(self._plan, state, stage.name, "assign", "stop", router=router, top_n=1)
        return tasks

    def _top_n(self, stage: Stage) -> int:
        """How many choices of every sequence the division needs: all where shards have, or may get, a capacity."""
        sharding = self._experiment.sharding
        all_of_them = sharding.capacity is not None or stage.kind == "reshard"
        return self._plan.mixture.num_shards if all_of_them else sharding.overlap

    def _divide(self, state: State, stage: Stage) -> list[Task]:
        return [stage_task(stage.name, "DIVIDE", "shards")]

    def _gather(self, state: State, stage: Stage) -> list[Task]:
        return [
            gather_task(self._plan, state, stage.name, "train", shard, blob(entry["manifest"]))
            for shard, entry in enumerate(local_result(state, stage.name, "DIVIDE")["shards"])
        ]

    # --- what the paths themselves say --------------------------------------------------------------------------------

    def _look(self, state: State, stage: Stage) -> list[Task]:
        """z of all router sequences."""
        return featurize_tasks(self._plan, state, stage.name, "sample", "router", sample_share=1.0)

    def _select(self, state: State, stage: Stage) -> list[Task]:
        return [stage_task(stage.name, "SELECT", "sequences")]

    def _score(self, state: State, stage: Stage) -> list[Task]:
        """Losses of the router sequences under each path: all of them, or those that have it among their candidates."""
        selected = local_result(state, stage.name, "SELECT")["selections"]
        selections = {subject: blob(pair) for subject, pair in selected.items()}
        whole = self._experiment.model.sequence_length  # only the sum over a sequence is needed
        return score_tasks(self._plan, state, stage.name, chunk_tokens=whole, selections=selections)

    def _gate(self, state: State, stage: Stage) -> list[Task]:
        return [stage_task(stage.name, "GATE", "router")]

    # --- what is left behind ------------------------------------------------------------------------------------------

    def concluded(self, state: State, stage: Stage) -> tuple[dict[str, Any], list[Shard]]:
        """The stage's result, and the shards of the mixture: forked from the base, or with other data than before."""
        if stage.kind == "shard" and self._experiment.sharding.kind == "all":
            return {}, [self.forked(state, MIXTURE)]
        divided = local_result(state, stage.name, "DIVIDE")
        gathered = {task.subject: task for task in state.tasks_of(stage.name) if task.kind == "PACK"}
        shards = [
            self._shard(state, stage, shard, entry, gathered[str(shard)])
            for shard, entry in enumerate(divided["shards"])
        ]
        if stage.kind == "reshard":
            return {**divided, **self.gated(state, stage)}, shards
        router = self._plan.fitted(state, stage)
        return {**divided, "router": None if router is None else [router.digest, router.size]}, shards

    def gated(self, state: State, stage: Stage) -> dict[str, Any]:
        """What a fitted gater leaves in the result of its stage: itself, and the numbers that say how good it is."""
        found = local_result(state, stage.name, "GATE")
        return {"router": found["router"], "gater": found["gater"]}

    def _shard(self, state: State, stage: Stage, shard: int, entry: dict[str, Any], gathered: Task) -> Shard:
        """A shard with its data; its cursor starts over with them."""
        before = state.shards[f"{MIXTURE}/{shard}"] if stage.kind == "reshard" else self._new_shard(state, shard)
        return replace(
            before,
            files=(gathered.outputs["tokens"],),
            training_tokens=gathered.result["tokens"] - gathered.result["sequences"],
            sequences=gathered.result["sequences"],
            manifest=blob(entry["manifest"]),
            steps_done=0,
        )

    def _new_shard(self, state: State, shard: int) -> Shard:
        base = self.forked(state, MIXTURE)
        path_index = self._plan.mixture.path_of_shard(shard)
        return replace(base, shard=shard, path_index=path_index)

    def forked(self, state: State, model: str) -> Shard:
        """The base's own shard, continued under another model."""
        base = state.shards[f"{BASE}/0"]
        copied = self._experiment.inner.fork_inner_state == "copy"
        return replace(
            base,
            model=model,
            phase=0,
            inner_state=base.inner_state if copied else None,
            adam_step=base.adam_step if copied else 0,
        )
