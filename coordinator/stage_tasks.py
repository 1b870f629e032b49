"""Tasks of stages that do not train: how they are named, and what the coordinator's own ones have answered. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coordinator.memory import evaluate_bytes, featurize_bytes
from coordinator.plan import MIXTURE, Plan, blob
from coordinator.state import State, Task
from protocol.tasks import BlobRef, EvaluateSpec, FeaturizeSpec, Message, PackSpec


def stage_task(stage: str, kind: str, subject: object, spec: Message | None = None) -> Task:
    """A task of a stage's next step; without a spec it is the coordinator's own."""
    document = {} if spec is None else spec.model_dump(mode="json")
    task_id = f"{stage}/{kind}/0/{subject}"
    return Task(task_id, stage, kind, 0, str(subject), local=spec is None, spec=document)


def local_result(state: State, stage: str, kind: str | None = None) -> dict[str, Any]:
    """What the newest of the coordinator's own tasks of a stage (of one kind) has answered."""
    return next(t.result for t in reversed(state.tasks_of(stage)) if t.local and kind in (None, t.kind))


def featurize_tasks(plan: Plan, state: State, stage: str, mode: str, split: str, **more: Any) -> list[Task]:
    """One FEATURIZE task a token file of the split, on the base unless `more` names another path."""
    defaults = {
        "base": plan.base_path(state),
        "required_bytes": featurize_bytes(plan.experiment.model, plan.vocab_size(state)),
    }
    return [
        stage_task(
            stage,
            "FEATURIZE",
            f"{mode}-{part['index']}",
            FeaturizeSpec(
                mode=mode,  # type: ignore[arg-type]
                tokens=blob(part["file"]),
                prefix_tokens=plan.experiment.sharding.prefix_tokens,
                numerics=plan.numerics,
                **{**defaults, **more},
            ),
        )
        for part in plan.ranges(state, split)
        if part["sequences"]
    ]


def score_tasks(
    plan: Plan,
    state: State,
    stage: str,
    *,
    chunk_tokens: int,
    selections: Mapping[str, BlobRef] | None = None,
    max_sequences: int | None = None,
) -> list[Task]:
    """Losses of the router sequences under each path of the mixture: one SCORE task a path and token file.

    `selections`: by the subject of a task what it is limited to, and no task where there is none.
    """
    return [
        stage_task(
            stage,
            "SCORE",
            f"{path_index}-{part['index']}",
            EvaluateSpec(
                path=plan.path_ref(state, MIXTURE, path_index),
                tokens=blob(part["file"]),
                prefix_tokens=plan.experiment.sharding.prefix_tokens,
                chunk_tokens=chunk_tokens,
                numerics=plan.numerics,
                selection=None if selections is None else selections[f"{path_index}-{part['index']}"],
                max_sequences=max_sequences,
                required_bytes=evaluate_bytes(
                    plan.experiment.model, plan.vocab_size(state), device=plan.numerics.device
                ),
            ),
        )
        for path_index in range(plan.mixture.num_paths)
        for part in plan.ranges(state, "router")
        if part["sequences"] and (selections is None or f"{path_index}-{part['index']}" in selections)
    ]


def gather_task(plan: Plan, state: State, stage: str, split: str, subject: object, manifest: BlobRef) -> Task:
    """PACK: the sequences of a manifest out of the token files of a split."""
    files = [blob(part["file"]) for part in plan.ranges(state, split) if part["sequences"]]
    return stage_task(stage, "PACK", subject, PackSpec(mode="gather", files=files, manifest=manifest))
