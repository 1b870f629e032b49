"""What the stages of a run are made of: their tasks, step by step, and what each stage leaves behind.

Pure: reads the state, returns rows. A stage is a list of steps, each a group of tasks without order among them;
training stages instead make the next task of a shard when its last one completes: no barrier across modules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from coordinator.memory import evaluate_bytes, featurize_bytes
from coordinator.plan import BASE, MIXTURE, TRAINING, Plan, blob, seed_of
from coordinator.state import Module, Row, Shard, Stage, State, Task
from protocol.tasks import EvaluateSpec, FeaturizeSpec, Message, PackSpec


class StageSteps:
    """The tasks of every stage of one run."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.experiment = plan.experiment
        self._steps: dict[str, tuple[Callable[[State], list[Task]], ...]] = {
            "corpus": (self._build, self._tokenize),
            "initialise": (self._initialise,),
            "shard": self._sharding_steps(),
            "evaluate": (self._route, self._evaluate, self._summarise),
        }

    # --- stages -----------------------------------------------------------------------------------------------------

    def begin(self, state: State, stage: Stage) -> list[Row]:
        """The rows that a stage starts with: models forked from the base, and its first tasks."""
        rows: list[Row] = []
        if stage.kind == "baseline":
            rows += self._fork(state, stage.model, [self._forked_shard(state, stage.model)])
        if stage.kind in TRAINING:
            shards = [row for row in rows if isinstance(row, Shard)] or state.shards_of(stage.model)
            return rows + [self.plan.train_task(stage, shard) for shard in shards]
        steps = self._steps[stage.kind]
        return [*rows, *steps[0](state)] if steps else []

    def proceed(self, state: State, stage: Stage) -> list[Task] | None:
        """The tasks of the step after `stage.step`, or None where the stage is over."""
        steps = self._steps.get(stage.kind, ())
        following = stage.step + 1
        return steps[following](state) if following < len(steps) else None

    def conclude(self, state: State, stage: Stage) -> tuple[dict[str, Any], list[Row]]:
        """What a finished stage leaves behind: its result, and rows of models and shards."""
        if stage.kind == "corpus":
            return self._concluded_corpus(state), []
        if stage.kind == "initialise":
            return {}, self._concluded_initialise(state)
        if stage.kind == "shard":
            return self._concluded_shard(state)
        if stage.kind == "evaluate":
            return dict(self._local_result(state, "evaluate")), []
        return {}, []

    # --- corpus and initial weights ---------------------------------------------------------------------------------

    def _task(self, stage: str, kind: str, subject: object, spec: Message | None = None) -> Task:
        """A task of a stage's next step; without a spec it is the coordinator's own."""
        document = {} if spec is None else spec.model_dump(mode="json")
        task_id = f"{stage}/{kind}/0/{subject}"
        return Task(task_id, stage, kind, 0, str(subject), local=spec is None, spec=document)

    def _local_result(self, state: State, stage: str, kind: str | None = None) -> dict[str, Any]:
        return next(t.result for t in reversed(state.tasks_of(stage)) if t.local and kind in (None, t.kind))

    def _build(self, state: State) -> list[Task]:
        return [self._task("corpus", "BUILD", "corpus")]

    def _tokenize(self, state: State) -> list[Task]:
        built = self._local_result(state, "corpus")
        return [
            self._task(
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

    def _concluded_corpus(self, state: State) -> dict[str, Any]:
        built = dict(self._local_result(state, "corpus"))
        packed = {task.subject: task for task in state.tasks_of("corpus") if task.kind == "PACK"}
        ranges = []
        for part in built["ranges"]:
            task = packed[str(part["index"])]
            tokens = task.outputs["tokens"]
            counts = {"tokens": task.result["tokens"], "sequences": task.result["sequences"]}
            ranges.append({**part, "file": [tokens.digest, tokens.size], **counts})
        return {**built, "ranges": ranges}

    def _initialise(self, state: State) -> list[Task]:
        return [self._task("initialise", "INITIALISE", BASE)]

    def _concluded_initialise(self, state: State) -> list[Row]:
        modules = self._local_result(state, "initialise")["modules"]
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

    # --- sharding ---------------------------------------------------------------------------------------------------

    def _sharding_steps(self) -> tuple[Callable[[State], list[Task]], ...]:
        kind = self.experiment.sharding.kind
        if kind == "all":
            return ()
        divide = (self._divide, self._gather)
        return divide if kind == "random" else (self._sample, self._fit, self._assign, *divide)

    def _featurize(self, state: State, mode: str, split: str, **more: Any) -> list[Task]:
        stage = "evaluate" if mode == "route" else "shard"
        return [
            self._task(
                stage,
                "FEATURIZE",
                f"{mode}-{part['index']}",
                FeaturizeSpec(
                    mode=mode,  # type: ignore[arg-type]
                    base=self.plan.base_path(state),
                    tokens=blob(part["file"]),
                    prefix_tokens=self.experiment.sharding.prefix_tokens,
                    numerics=self.plan.numerics,
                    required_bytes=featurize_bytes(self.experiment.model, self.plan.vocab_size(state)),
                    **more,
                ),
            )
            for part in self.plan.ranges(state, split)
            if part["sequences"]
        ]

    def _sample(self, state: State) -> list[Task]:
        sequences = sum(part["sequences"] for part in self.plan.ranges(state, "train"))
        share = min(1.0, self.experiment.sharding.sample_sequences / max(1, sequences))
        seed = seed_of(self.experiment.seed, "sample")
        return self._featurize(state, "sample", "train", sample_share=share, seed=seed)

    def _fit(self, state: State) -> list[Task]:
        return [self._task("shard", "FIT", "router")]

    def _assign(self, state: State) -> list[Task]:
        return self._featurize(state, "assign", "train", router=self.plan.router(state), top_n=self._top_n())

    def _top_n(self) -> int:
        """How many choices of every sequence the division needs: all of them where shards have a capacity."""
        sharding = self.experiment.sharding
        return self.plan.mixture.num_shards if sharding.capacity is not None else sharding.overlap

    def _divide(self, state: State) -> list[Task]:
        del state
        return [self._task("shard", "DIVIDE", "shards")]

    def _gather(self, state: State) -> list[Task]:
        files = [blob(part["file"]) for part in self.plan.ranges(state, "train") if part["sequences"]]
        return [
            self._task(
                "shard",
                "PACK",
                shard,
                PackSpec(mode="gather", files=files, manifest=blob(entry["manifest"])),
            )
            for shard, entry in enumerate(self._local_result(state, "shard", "DIVIDE")["shards"])
        ]

    def _concluded_shard(self, state: State) -> tuple[dict[str, Any], list[Row]]:
        if self.experiment.sharding.kind == "all":
            shards = [self._forked_shard(state, MIXTURE)]
            result: dict[str, Any] = {}
        else:
            divided = self._local_result(state, "shard", "DIVIDE")
            gathered = {task.subject: task for task in state.tasks_of("shard") if task.kind == "PACK"}
            shards = [
                self._mixture_shard(state, shard, entry, gathered[str(shard)])
                for shard, entry in enumerate(divided["shards"])
            ]
            router = self.plan.router(state)
            result = {**divided, "router": None if router is None else [router.digest, router.size]}
        return result, self._fork(state, MIXTURE, shards)

    def _mixture_shard(self, state: State, shard: int, entry: dict[str, Any], gathered: Task) -> Shard:
        copied = self.experiment.inner.fork_inner_state == "copy"
        base = state.shards[f"{BASE}/0"]
        return Shard(
            MIXTURE,
            shard,
            self.plan.mixture.path_of_shard(shard),
            files=(gathered.outputs["tokens"],),
            training_tokens=gathered.result["tokens"] - gathered.result["sequences"],
            sequences=gathered.result["sequences"],
            manifest=blob(entry["manifest"]),
            inner_state=base.inner_state if copied else None,
            adam_step=base.adam_step if copied else 0,
        )

    def _forked_shard(self, state: State, model: str) -> Shard:
        """The base's own shard, continued under another model."""
        base = state.shards[f"{BASE}/0"]
        copied = self.experiment.inner.fork_inner_state == "copy"
        return replace(
            base,
            model=model,
            phase=0,
            inner_state=base.inner_state if copied else None,
            adam_step=base.adam_step if copied else 0,
        )

    def _fork(self, state: State, model: str, shards: list[Shard]) -> list[Row]:
        """Every module of the model starts as the base's module of its level: the same blob."""
        base = {row.module_id: row.params for row in state.modules_of(BASE)}
        modules = [
            Module(model, module_id, 0, base[f"{module_id.partition('.')[0]}.0"])
            for module_id in self.plan.topology(model).module_ids
        ]
        return [*shards, *modules]

    # --- evaluation -------------------------------------------------------------------------------------------------

    def _route(self, state: State) -> list[Task]:
        router = self.plan.router(state) if MIXTURE in self.plan.evaluated_models() else None
        if router is None:
            return []
        evaluation = self.experiment.evaluation
        return self._featurize(
            state,
            "route",
            evaluation.split,
            router=router,
            intervals=self.plan.intervals(),
            max_sequences=evaluation.max_sequences,
        )

    def _evaluate(self, state: State) -> list[Task]:
        evaluation = self.experiment.evaluation
        tokenizer = blob(state.stages["corpus"].result["tokenizer"])
        return [
            self._task(
                "evaluate",
                "EVALUATE",
                f"{model}-{path_index}-{part['index']}",
                EvaluateSpec(
                    path=self.plan.path_ref(state, model, path_index),
                    tokens=blob(part["file"]),
                    tokenizer=tokenizer,
                    prefix_tokens=self.experiment.sharding.prefix_tokens,
                    chunk_tokens=self.plan.chunk_tokens(),
                    numerics=self.plan.numerics,
                    max_sequences=evaluation.max_sequences,
                    required_bytes=evaluate_bytes(
                        self.experiment.model, self.plan.vocab_size(state), device=self.plan.numerics.device
                    ),
                ),
            )
            for model in self.plan.evaluated_models()
            for path_index in range(self.plan.topology(model).num_paths)
            for part in self.plan.ranges(state, evaluation.split)
            if part["sequences"]
        ]

    def _summarise(self, state: State) -> list[Task]:
        return [self._task("evaluate", "SUMMARISE", "report")]
