"""What follows from the configuration: the models of a run, its stages, and the whole spec of a TRAIN task.

Pure: reads the state, returns rows and specs. Which tasks the other stages are made of stands in stage_steps.py.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import cached_property
from typing import Any

from configs.routes import chunk_tokens, router_intervals
from configs.schema import Config, Experiment, OuterConfig
from configs.stages import GaterStage, PretrainStage, ReshardStage, RouterStage, TrainStage
from coordinator.memory import train_bytes
from coordinator.outer import contribution_weights
from coordinator.state import Shard, Stage, State, Task, Version
from model.layout import ModuleSpec, TensorSpec, module_spec, path_tensors
from model.topology import Topology
from protocol.tasks import (
    BlobRef,
    Message,
    ModuleRef,
    Numerics,
    PathRef,
    TrainSpec,
    parse_spec,
)

BASE, MIXTURE, ROUTER = "base", "mixture", "router"
TRAINING = ("pretrain", "train", "baseline", "router")
SHARDING = ("shard", "reshard")
# Stages that may leave the run another router.
ROUTING = (*SHARDING, "gater")
OfMixture = TrainStage | ReshardStage | GaterStage
# The coordinator's own tasks whose result has a router.
FITTING = ("FIT", "GATE")


def seed_of(*parts: object) -> int:
    """A 63-bit seed from the run's seed and what it is for (design: seed = hash(run seed, task id))."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def blob(pair: Any) -> BlobRef:
    """A reference kept in a stage's result as [digest, size]."""
    return BlobRef(digest=pair[0], size=pair[1])


def _named(experiment: Experiment) -> list[tuple[str, OfMixture]]:
    """The stages of the mixture itself, in their order, with their names: later ones of a kind are numbered."""
    stages = [stage for stage in experiment.stages if isinstance(stage, OfMixture)]
    kinds = [stage.kind for stage in stages]
    counts = [kinds[: index + 1].count(kind) for index, kind in enumerate(kinds)]
    names = [kind if count == 1 else f"{kind}-{count}" for kind, count in zip(kinds, counts, strict=True)]
    return list(zip(names, stages, strict=True))


def _phases(named: list[tuple[str, OfMixture]]) -> dict[str, range]:
    """The phases of every train stage, by its name."""
    phases: dict[str, range] = {}
    first = 0
    for name, stage in named:
        if isinstance(stage, TrainStage):
            phases[name] = range(first, first + stage.phases)
            first += stage.phases
    return phases


class Plan:
    """Everything that follows from the configuration alone, and the tasks that follow from it and the state."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.experiment = config.experiment
        self.mixture = Topology.from_config(config.experiment.topology)
        self.dense = self.mixture.dense()
        self.outer_of_baseline = {baseline.name: baseline.outer for baseline in config.experiment.baselines}
        self._of_mixture = _named(config.experiment)
        self._phases = _phases(self._of_mixture)

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
        return self.outer_of_baseline.get(model, OuterConfig(kind="assign"))

    def _alone(self, model: str) -> PretrainStage | RouterStage | None:
        """What is configured for the stage of a model that is trained in steps of its own, where there is one."""
        return {BASE: self.experiment.pretrain, ROUTER: self.experiment.router}.get(model)

    def num_phases(self, model: str) -> int:
        if model in (BASE, ROUTER):
            stage = self._alone(model)
            return stage.steps // stage.inner_steps if stage else 0
        return self.experiment.phases

    def inner_steps(self, model: str) -> int:
        if model in (BASE, ROUTER):
            stage = self._alone(model)
            return stage.inner_steps if stage else 0
        return self.experiment.inner_steps

    def total_steps(self, model: str) -> int:
        """The horizon of the learning rate of a model's paths."""
        router = self.experiment.router
        return router.steps if router and model == ROUTER else self.experiment.total_steps

    def phases_of(self, stage: Stage) -> range:
        """The phases that a training stage takes its modules through; those of the mixture go on over re-shards."""
        return self._phases.get(stage.name, range(self.num_phases(stage.model)))

    def stage_of_phase(self, model: str, phase: int) -> str:
        """The name of the training stage in which a model takes a phase (beyond the last: its last)."""
        if model != MIXTURE:
            return "pretrain" if model == BASE else model
        return next((name for name, phases in self._phases.items() if phase in phases), [*self._phases][-1])

    def gated(self, stage: Stage) -> ReshardStage | GaterStage:
        """What is configured for a stage that fits a gater."""
        found = dict(self._of_mixture)[stage.name]
        assert isinstance(found, ReshardStage | GaterStage), f"{stage.name} fits no gater"
        return found

    def first_step(self, model: str) -> int:
        """The path's step counter when its model starts: the learning rate goes on where the base left it.

        That of the router LM starts anew.
        """
        pretrain = self.experiment.pretrain
        return pretrain.steps if pretrain and model not in (BASE, ROUTER) else 0

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
        before = "shard"
        for name, each in self._of_mixture:
            rows.append(Stage(name, each.kind, MIXTURE, (before,)))
            before = name
        if experiment.router:
            rows.append(Stage("targets", "targets", MIXTURE, (before,)))
            rows.append(Stage("router", "router", ROUTER, ("targets",)))
        if experiment.trains:
            rows += [Stage(line.name, "baseline", line.name, (trained,)) for line in experiment.baselines]
        if "evaluate" in kinds:
            rows.append(Stage("evaluate", "evaluate", "", tuple(row.name for row in rows)))
        return rows

    def evaluated_models(self) -> list[str]:
        """The trained models that the report compares."""
        if not self.experiment.trains:
            return [BASE]
        return [MIXTURE, *self.outer_of_baseline]

    def intervals(self) -> list[int]:
        """The intervals at which a configured route asks the router again, tokens."""
        return router_intervals(self.experiment.evaluation.routes)

    def router_intervals(self) -> list[int]:
        """The same for the router LM."""
        return router_intervals(self.experiment.evaluation.routes, "router")

    def chunk_tokens(self) -> int:
        """The grid on which losses are kept: it divides every interval."""
        return chunk_tokens(self.experiment.evaluation.routes)

    # --- what earlier stages left ------------------------------------------------------------------------------------

    def ranges(self, state: State, split: str) -> list[dict[str, Any]]:
        """The token files of one split, by range index."""
        return [part for part in state.stages["corpus"].result["ranges"] if part["split"] == split]

    def router(self, state: State) -> BlobRef | None:
        """The frozen router of the run as it stands, where it has one: that of its shards, or a gater fitted later."""
        done = [stage for stage in state.stages.values() if stage.kind in ROUTING and stage.status == "done"]
        frozen = [stage.result["router"] for stage in done if stage.result.get("router")]
        return blob(frozen[-1]) if frozen else None

    def fitted(self, state: State, stage: Stage) -> BlobRef | None:
        """The router that a stage which is not over has fitted, if it fits one."""
        fits = [task for task in state.tasks_of(stage.name) if task.kind in FITTING and task.status == "done"]
        return blob(fits[-1].result["router"]) if fits else None

    def base_path(self, state: State) -> PathRef:
        return self.path_ref(state, BASE, 0)

    # --- training ---------------------------------------------------------------------------------------------------

    def contribution_weights(self, state: State, model: str, module_id: str) -> dict[int, float]:
        """The weight of each shard's contribution to a module, by shard in the order in which they are added."""
        shards = self.topology(model).shards_of_module(module_id)
        tokens = [state.shards[f"{model}/{shard}"].training_tokens for shard in shards]
        return dict(zip(shards, contribution_weights(tokens), strict=True))

    def train_task(self, stage: Stage, shard: Shard) -> Task:
        """The next task of a shard."""
        task_id = f"{stage.name}/TRAIN/{shard.phase}/{shard.shard}"
        return Task(task_id, stage.name, "TRAIN", shard.phase, str(shard.shard))

    def path_ref(self, state: State, model: str, path_index: int, version: Version = "last") -> PathRef:
        """The newest versions of the modules of a path, or (of the mixture) its best where one was measured."""
        best = state.best.get(str(path_index)) if model == MIXTURE and version == "best" else None
        if best is not None and best.modules:
            return PathRef(model=model, path_index=path_index, modules=list(best.modules))
        rows = [state.modules[f"{model}/{mid}"] for mid in self.topology(model).modules_of_path(path_index)]
        modules = [ModuleRef(module_id=row.module_id, version=row.version, blob=row.params) for row in rows]
        return PathRef(model=model, path_index=path_index, modules=modules)

    def is_trainable(self, state: State, stage: Stage, task: Task) -> bool:
        """Whether all modules of the task's path have taken the outer steps of the phases before."""
        shard = state.shards[f"{stage.model}/{task.subject}"]
        modules = self.topology(stage.model).modules_of_path(shard.path_index)
        return all(state.modules[f"{stage.model}/{module_id}"].version == task.phase for module_id in modules)

    def train_spec(self, state: State, stage: Stage, task: Task) -> TrainSpec:
        """The whole task, from the newest versions: a pure function of modules, shard, inner state and seed.

        Where an earlier holder left a checkpoint it starts in the middle, to the same end.
        """
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
            total_steps=self.total_steps(model),
            shard_step=shard.steps_done,
            order_seed=self.order_seed(model, shard.shard, task.phase),
            outer=self.outer(model).kind,
            numerics=self.numerics,
            objective="router" if model == ROUTER else "lm",
            targets=[blob(state.stages["targets"].result["targets"])] if model == ROUTER else [],
            resume=None if task.independent else task.checkpoint,
            required_bytes=train_bytes(
                experiment.model,
                self.vocab_size(state),
                rows=min(rows, experiment.inner.batch_rows),
                dtype=experiment.numerics.dtype,
                checkpoint_activations=experiment.numerics.checkpoint_activations,
                device=experiment.numerics.device,
                inner=experiment.inner,
            ),
        )

    def order_seed(self, model: str, shard: int, phase: int) -> int:
        """Of the order of a shard's rows, of its own after every re-shard. Base and baselines share one of all data."""
        divided = model == MIXTURE and self.experiment.sharding.kind != "all"
        renewed = [*self._phases].index(self.stage_of_phase(model, phase)) if divided else 0
        generation = (renewed,) if renewed else ()
        return seed_of(self.experiment.seed, "order", MIXTURE if divided else "all", shard, *generation)

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

    def stored_spec(self, task: Task) -> Message:
        """The spec of any task that is not TRAIN: it was fixed when the task was made."""
        return parse_spec(task.spec)
