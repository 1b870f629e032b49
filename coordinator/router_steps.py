"""The steps of `targets`: what the router LM is to learn from the router split; and its shard. Pure.

The stage `router` after it is a training stage like any other: a model of one path with this shard (DiPaCo, arXiv
2403.10616, Sec 2.4.3 and 7.2.2).
"""

from __future__ import annotations

from typing import Any

from coordinator.expected import RECORD_BYTES
from coordinator.plan import ROUTER, Plan, blob
from coordinator.sharding_steps import Step
from coordinator.stage_tasks import gather_task, local_result, score_tasks, stage_task
from coordinator.state import Shard, Stage, State, Task

# In a record of losses: of each counted token its loss, its count and its bytes, and of each sequence some words more.
_BYTES_OF_A_TOKEN, _BYTES_OF_A_SEQUENCE = 16, 16


class RouterSteps:
    """The tasks of the stage that makes the router LM's targets."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._experiment = plan, plan.experiment
        self.targets: tuple[Step, ...] = (self._score, self._label, self._gather)

    def _score(self, state: State, stage: Stage) -> list[Task]:
        """The loss of every single token under each path, of no more sequences than a record has room for."""
        router = self._experiment.router
        assert router is not None, "a stage of another run"
        counted = self._experiment.model.sequence_length - 1 - self._experiment.sharding.prefix_tokens
        room = RECORD_BYTES // 2 // (_BYTES_OF_A_TOKEN * counted + _BYTES_OF_A_SEQUENCE)
        most = min(room, router.max_sequences or room)
        return score_tasks(self._plan, state, stage.name, chunk_tokens=1, max_sequences=most)

    def _label(self, state: State, stage: Stage) -> list[Task]:
        return [stage_task(stage.name, "LABEL", "paths")]

    def _gather(self, state: State, stage: Stage) -> list[Task]:
        """The sequences that have targets, in one token file."""
        manifest = blob(local_result(state, stage.name)["manifest"])
        return [gather_task(self._plan, state, stage.name, "router", "router", manifest)]

    def concluded(self, state: State, stage: Stage) -> dict[str, Any]:
        """The stage's result: the targets, and the token file in whose places they stand."""
        [gathered] = [task for task in state.tasks_of(stage.name) if task.kind == "PACK"]
        tokens = gathered.outputs["tokens"]
        return {**local_result(state, stage.name), "file": [tokens.digest, tokens.size]}

    def shard(self, state: State) -> Shard:
        """The router LM's one shard. Its inner state starts anew: the base's is that of another loss."""
        found = state.stages["targets"].result
        return Shard(
            ROUTER,
            0,
            0,
            files=(blob(found["file"]),),
            training_tokens=found["labelled_tokens"],
            sequences=found["sequences"],
            manifest=blob(found["manifest"]),
        )
