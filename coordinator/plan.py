"""What the stages of a run consist of: which models there are, which tasks a stage makes, what it leaves behind.

Pure: reads the state, returns rows. A stage is a list of steps, each a group of tasks without order among them; TRAIN
stages instead make the next task of a shard when its last one completes, so that there is no barrier across modules.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

from configs.schema import Config, OuterConfig
from coordinator.memory import evaluate_bytes, featurize_bytes, train_bytes
from coordinator.state import Module, Row, Shard, Stage, State, Task
from model.layout import ModuleSpec, TensorSpec, module_spec, path_tensors
from model.topology import Topology
from protocol.tasks import (
    BlobRef,
    EvaluateSpec,
    FeaturizeSpec,
    Message,
    ModuleRef,
    Numerics,
    PackSpec,
    PathRef,
    TrainSpec,
    parse_spec,
)

BASE, MIXTURE = "base", "mixture"
TRAINING = ("pretrain", "train", "baseline")
DEFAULT_CHUNK_TOKENS = 32


def seed_of(*parts: object) -> int:
    """A 63-bit seed from the run's seed and what it is for (design: seed = hash(run seed, task id))."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def blob(pair: Any) -> BlobRef:
    """A reference kept in a stage's result as [digest, size]."""
    return BlobRef(digest=pair[0], size=pair[1])


class Plan:
    """Everything that follows from the configuration alone, and the tasks that follow from it and the state."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.experiment = config.experiment
        self.mixture = Topology.from_config(config.experiment.topology)
        self.dense = self.mixture.dense()
        self._outer = {baseline.name: baseline.outer for baseline in config.experiment.baselines}
        self._steps: dict[str, tuple[Callable[[State], list[Task]], ...]] = {
            "corpus": (self._build, self._tokenize),
            "initialise": (self._initialise,),
            "shard": self._sharding_steps(),
            "evaluate": (self._route, self._evaluate, self._summarise),
        }

    # --- models -----------------------------------------------------------------------------------------------------

    @cached_property
    def numerics(self) -> Numerics:
        return Numerics.model_validate(self.experiment.numerics.model_dump())

    def topology(self, model: str) -> Topology:
        return self.mixture if model == MIXTURE else self.dense

    def outer(self, model: str) -> OuterConfig:
        """The outer step of a model; the base is trained plainly."""
        if model == MIXTURE:
            return self.experiment.outer
        return self._outer.get(model, OuterConfig(kind="assign"))

    def num_phases(self, model: str) -> int:
        if model == BASE:
            pretrain = self.experiment.pretrain
            return pretrain.steps // pretrain.inner_steps if pretrain else 0
        return self.experiment.train.phases if self.experiment.train else 0

    def inner_steps(self, model: str) -> int:
        stage = self.experiment.pretrain if model == BASE else self.experiment.train
        return stage.inner_steps if stage else 0

    def first_step(self, model: str) -> int:
        """The path's step counter when its model starts: the learning rate goes on where the base left it."""
        pretrain = self.experiment.pretrain
        return pretrain.steps if pretrain and model != BASE else 0

    def vocab_size(self, state: State) -> int:
        return int(state.stages["corpus"].result["vocab_size"])

    def module_spec(self, state: State, model: str, module_id: str) -> ModuleSpec:
        return module_spec(self.experiment.model, self.vocab_size(state), self.topology(model), module_id)

    def path_tensors(self, state: State) -> tuple[TensorSpec, ...]:
        """The tensors of any path, sorted by name."""
        return path_tensors(self.experiment.model, self.vocab_size(state), self.dense)

    # --- stages -----------------------------------------------------------------------------------------------------

    def stages(self) -> list[Stage]:
        """All stages of the run with what each of them waits for."""
        experiment = self.experiment
        rows = [Stage("corpus", "corpus", "", ()), Stage("initialise", "initialise", BASE, ("corpus",))]
        trained = "initialise"
        if experiment.pretrain:
            rows.append(Stage("pretrain", "pretrain", BASE, (trained,)))
            trained = "pretrain"
        kinds = {stage.kind for stage in experiment.stages}
        if "shard" in kinds:
            rows.append(Stage("shard", "shard", MIXTURE, (trained,)))
        if experiment.train:
            rows.append(Stage("train", "train", MIXTURE, ("shard",)))
            rows += [Stage(line.name, "baseline", line.name, (trained,)) for line in experiment.baselines]
        if "evaluate" in kinds:
            rows.append(Stage("evaluate", "evaluate", "", tuple(row.name for row in rows)))
        return rows

    def evaluated_models(self) -> list[str]:
        """The trained models that the report compares."""
        if not self.experiment.train:
            return [BASE]
        return [MIXTURE, *self._outer]

    def begin(self, state: State, stage: Stage) -> list[Row]:
        """The rows that a stage starts with: models forked from the base, and its first tasks."""
        rows: list[Row] = []
        if stage.kind == "baseline":
            rows += self._fork(state, stage.model, [self._forked_shard(state, stage.model)])
        if stage.kind in TRAINING:
            shards = [row for row in rows if isinstance(row, Shard)] or state.shards_of(stage.model)
            return rows + [self.train_task(stage, shard) for shard in shards]
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

    def stored_spec(self, task: Task) -> Message:
        """The spec of any task that is not TRAIN: it was fixed when the task was made."""
        return parse_spec(task.spec)

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

    def ranges(self, state: State, split: str) -> list[dict[str, Any]]:
        """The token files of one split, by range index."""
        return [part for part in state.stages["corpus"].result["ranges"] if part["split"] == split]

    def _initialise(self, state: State) -> list[Task]:
        return [self._task("initialise", "INITIALISE", BASE)]

    def _concluded_initialise(self, state: State) -> list[Row]:
        modules = self._local_result(state, "initialise")["modules"]
        parts = self.ranges(state, "train")
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

    def base_path(self, state: State) -> PathRef:
        return self.path_ref(state, BASE, 0)

    def _featurize(self, state: State, mode: str, split: str, **more: Any) -> list[Task]:
        stage = "evaluate" if mode == "route" else "shard"
        return [
            self._task(
                stage,
                "FEATURIZE",
                f"{mode}-{part['index']}",
                FeaturizeSpec(
                    mode=mode,  # type: ignore[arg-type]
                    base=self.base_path(state),
                    tokens=blob(part["file"]),
                    prefix_tokens=self.experiment.sharding.prefix_tokens,
                    numerics=self.numerics,
                    required_bytes=featurize_bytes(self.experiment.model, self.vocab_size(state)),
                    **more,
                ),
            )
            for part in self.ranges(state, split)
            if part["sequences"]
        ]

    def _sample(self, state: State) -> list[Task]:
        sequences = sum(part["sequences"] for part in self.ranges(state, "train"))
        share = min(1.0, self.experiment.sharding.sample_sequences / max(1, sequences))
        seed = seed_of(self.experiment.seed, "sample")
        return self._featurize(state, "sample", "train", sample_share=share, seed=seed)

    def _fit(self, state: State) -> list[Task]:
        return [self._task("shard", "FIT", "router")]

    def router(self, state: State) -> BlobRef | None:
        """The frozen router of the run, where it has one."""
        if state.stages["shard"].status == "done":
            frozen = state.stages["shard"].result.get("router")
            return blob(frozen) if frozen else None
        fitted = [task for task in state.tasks_of("shard") if task.kind == "FIT" and task.status == "done"]
        return blob(fitted[-1].result["router"]) if fitted else None

    def _assign(self, state: State) -> list[Task]:
        return self._featurize(state, "assign", "train", router=self.router(state), top_n=self._top_n())

    def _top_n(self) -> int:
        """How many choices of every sequence the division needs: all of them where shards have a capacity."""
        sharding = self.experiment.sharding
        return self.mixture.num_paths if sharding.capacity is not None else sharding.overlap

    def _divide(self, state: State) -> list[Task]:
        del state
        return [self._task("shard", "DIVIDE", "shards")]

    def _gather(self, state: State) -> list[Task]:
        files = [blob(part["file"]) for part in self.ranges(state, "train") if part["sequences"]]
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
            router = self.router(state)
            result = {**divided, "router": None if router is None else [router.digest, router.size]}
        return result, self._fork(state, MIXTURE, shards)

    def _mixture_shard(self, state: State, shard: int, entry: dict[str, Any], gathered: Task) -> Shard:
        copied = self.experiment.inner.fork_inner_state == "copy"
        base = state.shards[f"{BASE}/0"]
        return Shard(
            MIXTURE,
            shard,
            self.mixture.path_of_shard(shard),
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
            for module_id in self.topology(model).module_ids
        ]
        return [*shards, *modules]

    # --- training ---------------------------------------------------------------------------------------------------

    def train_task(self, stage: Stage, shard: Shard) -> Task:
        """The next task of a shard."""
        task_id = f"{stage.name}/TRAIN/{shard.phase}/{shard.shard}"
        return Task(task_id, stage.name, "TRAIN", shard.phase, str(shard.shard))

    def path_ref(self, state: State, model: str, path_index: int) -> PathRef:
        """The newest versions of the modules of a path."""
        rows = [state.modules[f"{model}/{mid}"] for mid in self.topology(model).modules_of_path(path_index)]
        modules = [ModuleRef(module_id=row.module_id, version=row.version, blob=row.params) for row in rows]
        return PathRef(model=model, path_index=path_index, modules=modules)

    def is_trainable(self, state: State, stage: Stage, task: Task) -> bool:
        """Whether all modules of the task's path have taken the outer steps of the phases before."""
        shard = state.shards[f"{stage.model}/{task.subject}"]
        modules = self.topology(stage.model).modules_of_path(shard.path_index)
        return all(state.modules[f"{stage.model}/{module_id}"].version == task.phase for module_id in modules)

    def train_spec(self, state: State, stage: Stage, task: Task) -> TrainSpec:
        """The whole task, from the newest versions: a pure function of modules, shard, inner state and seed."""
        model, experiment = stage.model, self.experiment
        shard = state.shards[f"{model}/{task.subject}"]
        keep = experiment.inner.inner_state == "keep"
        inner_steps = self.inner_steps(model)
        rows = experiment.numerics.micro_batch_rows or experiment.inner.batch_rows
        return TrainSpec(
            path=self.path_ref(state, model, shard.path_index),
            shard=shard.shard,
            tokens=list(shard.files),
            inner_state=shard.inner_state,
            adam_step=shard.adam_step if keep or shard.inner_state else 0,
            phase=task.phase,
            first_step=self.first_step(model) + task.phase * inner_steps,
            steps=inner_steps,
            total_steps=experiment.total_steps,
            shard_step=shard.steps_done,
            order_seed=self.order_seed(model, shard.shard),
            outer=self.outer(model).kind,
            numerics=self.numerics,
            required_bytes=train_bytes(
                experiment.model,
                self.vocab_size(state),
                rows=min(rows, experiment.inner.batch_rows),
                dtype=experiment.numerics.dtype,
                checkpoint_activations=experiment.numerics.checkpoint_activations,
                device=experiment.numerics.device,
            ),
        )

    def order_seed(self, model: str, shard: int) -> int:
        """Of the order of a shard's rows. Base and baselines share a shard, and so its order."""
        divided = model == MIXTURE and self.experiment.sharding.kind != "all"
        return seed_of(self.experiment.seed, "order", MIXTURE if divided else "all", shard)

    def trained(self, stage: Stage, shard: Shard, inner_state: BlobRef | None) -> Shard:
        """The shard after one more task."""
        steps = self.inner_steps(stage.model)
        return replace(
            shard,
            phase=shard.phase + 1,
            steps_done=shard.steps_done + steps,
            adam_step=shard.adam_step + steps if inner_state else 0,
            inner_state=inner_state,
        )

    # --- evaluation -------------------------------------------------------------------------------------------------

    def intervals(self) -> list[int]:
        """The re-routing intervals of the configured routes, tokens."""
        routes = self.experiment.evaluation.routes
        return sorted({int(route.rpartition(":")[2]) for route in routes if "every:" in route})

    def chunk_tokens(self) -> int:
        """The grid on which losses are kept: it divides every interval."""
        return math.gcd(*self.intervals()) or DEFAULT_CHUNK_TOKENS

    def _route(self, state: State) -> list[Task]:
        router = self.router(state) if MIXTURE in self.evaluated_models() else None
        if router is None:
            return []
        evaluation = self.experiment.evaluation
        return self._featurize(
            state,
            "route",
            evaluation.split,
            router=router,
            intervals=self.intervals(),
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
                    path=self.path_ref(state, model, path_index),
                    tokens=blob(part["file"]),
                    tokenizer=tokenizer,
                    prefix_tokens=self.experiment.sharding.prefix_tokens,
                    chunk_tokens=self.chunk_tokens(),
                    numerics=self.numerics,
                    max_sequences=evaluation.max_sequences,
                    required_bytes=evaluate_bytes(
                        self.experiment.model, self.vocab_size(state), device=self.numerics.device
                    ),
                ),
            )
            for model in self.evaluated_models()
            for path_index in range(self.topology(model).num_paths)
            for part in self.ranges(state, evaluation.split)
            if part["sequences"]
        ]

    def _summarise(self, state: State) -> list[Task]:
        return [self._task("evaluate", "SUMMARISE", "report")]
