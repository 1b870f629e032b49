"""Early stopping: which snapshots of a path are measured, on which sequences, and which of them is its best. Pure.

It selects and never stops training (DiPaCo, arXiv 2403.10616, Sec 2.7). The snapshot of a path at a version is complete
when the later of its modules reaches it: none can go on before the path's own shards have trained on it.
"""

from __future__ import annotations

from typing import Any

from coordinator.memory import evaluate_bytes
from coordinator.plan import MIXTURE, SHARDING, Plan, blob
from coordinator.state import Best, Module, Stage, State, Task
from protocol.tasks import BlobRef, EvaluateSpec, PathRef

STOP = "STOP"


class EarlyStopping:
    """The STOP tasks of one run, beside the TRAIN tasks of its train stages, and what follows from them."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._config = plan, plan.experiment.early_stopping

    # --- what is measured ---------------------------------------------------------------------------------------------

    def due(self, state: State, stepped: Module) -> list[Task]:
        """STOP tasks of the paths whose snapshot a module's new version completes, where that version is measured."""
        if self._config is None or stepped.model != MIXTURE:
            return []
        stage = state.stages[self._plan.stage_of_phase(MIXTURE, stepped.version - 1)]
        phases = self._plan.phases_of(stage)
        if stepped.version != phases.stop and (stepped.version - phases.start) % self._config.every:
            return []
        topology = self._plan.mixture
        paths = {topology.path_of_shard(shard) for shard in topology.shards_of_module(stepped.module_id)}
        snapshots = (self._plan.path_ref(state, MIXTURE, path_index) for path_index in sorted(paths))
        complete = [path for path in snapshots if all(each.version == stepped.version for each in path.modules)]
        return [task for path in complete for task in self._tasks(state, stage.name, stepped.version - 1, path)]

    def _tasks(self, state: State, stage: str, phase: int, path: PathRef) -> list[Task]:
        """One a token file in which the path has sequences; their specs keep the snapshot until they are done."""
        assert self._config is not None
        made = []
        for part in self._plan.ranges(state, "stop"):
            routed, selection = self._selection(state, path.path_index, part)
            if selection is None and (routed or not part["sequences"]):
                continue
            spec = EvaluateSpec(
                path=path,
                tokens=blob(part["file"]),
                prefix_tokens=self._plan.experiment.sharding.prefix_tokens,
                chunk_tokens=self._plan.experiment.model.sequence_length,  # only the sum over a sequence is needed
                numerics=self._plan.numerics,
                max_sequences=self._config.max_sequences,
                selection=selection,
                required_bytes=evaluate_bytes(
                    self._plan.experiment.model, self._plan.vocab_size(state), device=self._plan.numerics.device
                ),
            )
            subject = f"{path.path_index}-{part['index']}"
            task_id = f"{stage}/{STOP}/{phase}/{subject}"
            made.append(Task(task_id, stage, STOP, phase, subject, spec=spec.model_dump(mode="json")))
        return made

    def _selection(self, state: State, path_index: int, part: dict[str, Any]) -> tuple[bool, BlobRef | None]:
        """Whether a router divides the stop split, and which positions of a token file it gives to a path (or none)."""
        divided = [s.result for s in state.stages.values() if s.kind in SHARDING and s.status == "done"][-1]
        if "stop" not in divided:
            return False, None
        chosen = divided["stop"].get(f"{path_index}-{part['index']}")
        return True, None if chosen is None else blob(chosen)

    def is_over(self, state: State, stage: Stage) -> bool:
        """Whether nothing is left to measure in a stage."""
        return all(task.status == "done" for task in state.tasks_of(stage.name) if task.kind == STOP)

    # --- what is best -------------------------------------------------------------------------------------------------

    def settled(self, state: State, done: Task) -> tuple[list[Best], list[Task]]:
        """What a STOP task that is done has settled: the best of its path where that changes, and tasks that may go.

        Nothing before the last task of the snapshot is done. Of equal losses the earlier phase stays, whichever of them
        was measured first.
        """
        measured = [task for task in state.tasks_of(done.stage) if _snapshot(task) == _snapshot(done)]
        if any(task.status != "done" for task in measured):
            return [], []
        measured.sort(key=lambda task: int(task.subject.partition("-")[2]))
        spec = self._plan.stored_spec(done)
        assert isinstance(spec, EvaluateSpec)
        found = Best(
            spec.path.path_index,
            done.phase,
            tuple(spec.path.modules),
            sum(task.result["loss_sum"] for task in measured),
            sum(task.result["tokens"] for task in measured),
        )
        return [found] if found.tokens and _is_better(found, state.best.get(found.key)) else [], measured

    def reset(self, state: State) -> list[Best]:
        """After a re-shard nothing that was measured before counts: the paths have other stop sequences."""
        return [Best(row.path_index) for row in state.best.values() if row.modules]

    def consumed(self, state: State) -> list[str]:
        """Tasks of running stages whose snapshot is wholly measured: the journal alone keeps them."""
        tasks = [t for t in state.tasks.values() if t.kind == STOP and state.stages[t.stage].status != "done"]
        waiting = {_snapshot(task) for task in tasks if task.status != "done"}
        return [task.task_id for task in tasks if _snapshot(task) not in waiting]


def _snapshot(task: Task) -> tuple[str, str, int, str]:
    """What a STOP task measures a part of: stage, phase and path."""
    return task.kind, task.stage, task.phase, task.subject.partition("-")[0]


def _is_better(found: Best, kept: Best | None) -> bool:
    if kept is None or not kept.modules:
        return True
    return (found.loss_sum / found.tokens, found.phase) < (kept.loss_sum / kept.tokens, kept.phase)
