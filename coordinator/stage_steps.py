"""What the stages of a run are made of: their tasks, step by step, and what each stage leaves behind.

Pure: reads the state, returns rows. A stage is a list of steps, each a group of tasks without order among them;
training stages instead make the next task of a shard when its last one completes: no barrier across modules.
"""

from __future__ import annotations

from typing import Any

from coordinator.early_stopping import EarlyStopping
from coordinator.evaluation_steps import EvaluationSteps
from coordinator.plan import BASE, MIXTURE, TRAINING, Plan, blob
from coordinator.router_steps import RouterSteps
from coordinator.sharding_steps import ShardingSteps, Step
from coordinator.stage_tasks import local_result, stage_task
from coordinator.state import Module, Row, Shard, Stage, State, Task
from protocol.tasks import PackSpec


class StageSteps:
    """The tasks of every stage of one run."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.experiment = plan.experiment
        self._sharding, self._router = ShardingSteps(plan), RouterSteps(plan)
        self._steps: dict[str, tuple[Step, ...]] = {
            "corpus": (self._build, self._tokenize, self._check),
            "initialise": (self._initialise,),
            "shard": self._sharding.shard,
            "reshard": self._sharding.reshard,
            "gater": self._sharding.gater,
            "targets": self._router.targets,
            "evaluate": EvaluationSteps(plan).evaluate,
        }

    # --- stages -----------------------------------------------------------------------------------------------------

    def begin(self, state: State, stage: Stage) -> list[Row]:
        """The rows that a stage starts with: models forked from the base, and its first tasks."""
        rows: list[Row] = []
        if stage.kind == "baseline":
            rows += self._fork(state, stage.model, [self._sharding.forked(state, stage.model)])
        if stage.kind == "router":
            rows += self._fork(state, stage.model, [self._router.shard(state)])
        if stage.kind in TRAINING:
            shards = [row for row in rows if isinstance(row, Shard)] or state.shards_of(stage.model)
            return rows + [self.plan.train_task(stage, shard) for shard in shards]
        steps = self._steps[stage.kind]
        return [*rows, *steps[0](state, stage)] if steps else []

    def proceed(self, state: State, stage: Stage) -> list[Task] | None:
        """The tasks of the step after `stage.step`, or None where the stage is over."""
        steps = self._steps.get(stage.kind, ())
        following = stage.step + 1
        return steps[following](state, stage) if following < len(steps) else None

    def conclude(self, state: State, stage: Stage) -> tuple[dict[str, Any], list[Row]]:
        """What a finished stage leaves behind: its result, and rows of models and shards."""
        if stage.kind == "corpus":
            return self._concluded_corpus(state), []
        if stage.kind == "initialise":
            return {}, self._concluded_initialise(state)
        if stage.kind == "shard":
            result, shards = self._sharding.concluded(state, stage)
            return result, self._fork(state, MIXTURE, shards)
        if stage.kind == "reshard":
            result, shards = self._sharding.concluded(state, stage)
            return result, [*shards, *EarlyStopping(self.plan).reset(state)]
        if stage.kind == "gater":
            return self._sharding.gated(state, stage), []
        if stage.kind == "targets":
            return self._router.concluded(state, stage), []
        if stage.kind == "evaluate":
            return dict(local_result(state, stage.name)), []
        return {}, []

    # --- corpus and initial weights ---------------------------------------------------------------------------------

    def _build(self, state: State, stage: Stage) -> list[Task]:
        return [stage_task("corpus", "BUILD", "corpus")]

    def _tokenize(self, state: State, stage: Stage) -> list[Task]:
        built = local_result(state, "corpus")
        return [
            stage_task(
                "corpus",
                "PACK",
                part["index"],
                PackSpec(
                    mode="tokenize",
                    tokenizer=blob(built["tokenizer"]),
                    text=blob(part["text"]),
                    range_index=part["index"],
                ),
            )
            for part in built["ranges"]
        ]

    def _check(self, state: State, stage: Stage) -> list[Task]:
        """Whether the held-out splits will do for what is to be fitted to them: before anything is trained."""
        experiment = self.experiment
        needed = experiment.gated or experiment.router or experiment.early_stopping
        return [stage_task(stage.name, "CHECK", "splits")] if needed else []

    def _concluded_corpus(self, state: State) -> dict[str, Any]:
        built = dict(local_result(state, "corpus", "BUILD"))
        packed = {task.subject: task for task in state.tasks_of("corpus") if task.kind == "PACK"}
        ranges = []
        for part in built["ranges"]:
            task = packed[str(part["index"])]
            tokens = task.outputs["tokens"]
            counts = {"tokens": task.result["tokens"], "sequences": task.result["sequences"]}
            ranges.append({**part, "file": [tokens.digest, tokens.size], **counts})
        return {**built, "ranges": ranges}

    def _initialise(self, state: State, stage: Stage) -> list[Task]:
        return [stage_task("initialise", "INITIALISE", BASE)]

    def _concluded_initialise(self, state: State) -> list[Row]:
        modules = local_result(state, "initialise")["modules"]
        parts = self.plan.ranges(state, "train")
        shard = Shard(
            BASE,
            0,
            0,
            files=tuple(blob(part["file"]) for part in parts),
            training_tokens=sum(part["tokens"] - part["sequences"] for part in parts),
            sequences=sum(part["sequences"] for part in parts),
        )
        return [shard, *(Module(BASE, module_id, 0, blob(pair)) for module_id, pair in modules.items())]

    def _fork(self, state: State, model: str, shards: list[Shard]) -> list[Row]:
        """Every module of the model starts as the base's module of its level: the same blob."""
        base = {row.module_id: row.params for row in state.modules_of(BASE)}
        modules = [
            Module(model, module_id, 0, base[f"{module_id.partition('.')[0]}.0"])
            for module_id in self.plan.topology(model).module_ids
        ]
        return [*shards, *modules]
