"""The steps of `evaluate`: routes of the held-out split, losses under every path of every model, a summary. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from coordinator.memory import evaluate_bytes
from coordinator.plan import MIXTURE, ROUTER, Plan, blob
from coordinator.stage_tasks import featurize_tasks, stage_task
from coordinator.state import Stage, State, Task, Version
from protocol.tasks import EvaluateSpec, PathRef

# What reports call the mixture at its two versions.
REPORTED: dict[Version, str] = {"last": "dipaco", "best": "dipaco-best"}
# In subjects of tasks, the paths of the mixture whose best version is not their last.
BEST_OF_MIXTURE = f"{MIXTURE}.best"


class EvaluationSteps:
    """The tasks of the stage that measures."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._experiment = plan, plan.experiment
        self.evaluate = (self._routes, self._evaluate, self._summarise)

    def _routes(self, state: State, stage: Stage) -> list[Task]:
        return [*self._route(state, stage), *self._look(state, stage)]

    def _look(self, state: State, stage: Stage) -> list[Task]:
        """What the router LM chooses, where a configured route asks it."""
        intervals, evaluation = self._plan.router_intervals(), self._experiment.evaluation
        if not intervals or self._experiment.router is None:
            return []
        model, vocab_size = self._experiment.model, self._plan.vocab_size(state)
        return featurize_tasks(
            self._plan,
            state,
            stage.name,
            "look",
            evaluation.split,
            base=self._plan.path_ref(state, ROUTER, 0),
            required_bytes=evaluate_bytes(model, vocab_size, device=self._plan.numerics.device),
            intervals=intervals,
            max_sequences=evaluation.max_sequences,
        )

    def _route(self, state: State, stage: Stage) -> list[Task]:
        router = self._plan.router(state) if MIXTURE in self._plan.evaluated_models() else None
        if router is None:
            return []
        evaluation = self._experiment.evaluation
        return featurize_tasks(
            self._plan,
            state,
            stage.name,
            "route",
            evaluation.split,
            router=router,
            intervals=self._plan.intervals(),
            max_sequences=evaluation.max_sequences,
        )

    def _evaluate(self, state: State, stage: Stage) -> list[Task]:
        evaluation = self._experiment.evaluation
        tokenizer = blob(state.stages["corpus"].result["tokenizer"])
        return [
            stage_task(
                stage.name,
                "EVALUATE",
                f"{subject}-{part['index']}",
                EvaluateSpec(
                    path=path,
                    tokens=blob(part["file"]),
                    tokenizer=tokenizer,
                    prefix_tokens=self._experiment.sharding.prefix_tokens,
                    chunk_tokens=self._plan.chunk_tokens(),
                    numerics=self._plan.numerics,
                    max_sequences=evaluation.max_sequences,
                    required_bytes=evaluate_bytes(
                        self._experiment.model, self._plan.vocab_size(state), device=self._plan.numerics.device
                    ),
                ),
            )
            for subject, path in self._paths(state)
            for part in self._plan.ranges(state, evaluation.split)
            if part["sequences"]
        ]

    def _paths(self, state: State) -> Iterator[tuple[str, PathRef]]:
        """All paths that are measured, each once, with what names them in subjects."""
        for model in self._plan.evaluated_models():
            for path_index in range(self._plan.topology(model).num_paths):
                last = self._plan.path_ref(state, model, path_index)
                yield f"{model}-{path_index}", last
                best = self._plan.path_ref(state, model, path_index, "best")
                if best != last:
                    yield f"{BEST_OF_MIXTURE}-{path_index}", best

    def _summarise(self, state: State, stage: Stage) -> list[Task]:
        return [stage_task(stage.name, "SUMMARISE", "report")]
