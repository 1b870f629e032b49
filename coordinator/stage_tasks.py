"""Tasks of stages that do not train: how they are named, and what the coordinator's own ones have answered. Pure."""

from __future__ import annotations

from typing import Any

from coordinator.memory import featurize_bytes
from coordinator.plan import Plan, blob
from coordinator.state import State, Task
from protocol.tasks import FeaturizeSpec, Message


def stage_task(stage: str, kind: str, subject: object, spec: Message | None = None) -> Task:
    """A task of a stage's next step; without a spec it is the coordinator's own."""
    document = {} if spec is None else spec.model_dump(mode="json")
    task_id = f"{stage}/{kind}/0/{subject}"
    return Task(task_id, stage, kind, 0, str(subject), local=spec is None, spec=document)


def local_result(state: State, stage: str, kind: str | None = None) -> dict[str, Any]:
    """What the newest of the coordinator's own tasks of a stage (of one kind) has answered."""
    return next(t.result for t in reversed(state.tasks_of(stage)) if t.local and kind in (None, t.kind))


def featurize_tasks(plan: Plan, state: State, stage: str, mode: str, split: str, **more: Any) -> list[Task]:
    """One FEATURIZE task a token file of the split."""
    return [
        stage_task(
            stage,
            "FEATURIZE",
            f"{mode}-{part['index']}",
            FeaturizeSpec(
                mode=mode,  # type: ignore[arg-type]
                base=plan.base_path(state),
                tokens=blob(part["file"]),
                prefix_tokens=plan.experiment.sharding.prefix_tokens,
                numerics=plan.numerics,
                required_bytes=featurize_bytes(plan.experiment.model, plan.vocab_size(state)),
                **more,
            ),
        )
        for part in plan.ranges(state, split)
        if part["sequences"]
    ]
