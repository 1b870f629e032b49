"""Whether the held-out splits will do for what is fitted to them or chosen by them, before anything is trained."""

from __future__ import annotations

from typing import Any

from coordinator.plan import Plan
from coordinator.stage_tasks import local_result
from coordinator.state import State, Task
from corpus.token_file import TokenFile
from model.store import BlobStore
from routing.records import evaluated_positions
from routing.sharding import UnusableShards


class HeldOut:
    """The splits `router` and `stop` of one run."""

    def __init__(self, plan: Plan, store: BlobStore) -> None:
        self._plan, self._store = plan, store

    def check(self, task: Task, state: State) -> dict[str, Any]:
        """How many sequences of each are long enough to be measured; raises UnusableShards where they are too few."""
        experiment, paths = self._plan.experiment, self._plan.mixture.num_paths
        wanted = {
            "router": 2 * paths if experiment.gated else int(experiment.router is not None),
            "stop": int(experiment.early_stopping is not None),
        }
        found = {split: self._long_enough(task, state, split) for split, at_least in wanted.items() if at_least}
        for split, count in found.items():
            if count < wanted[split]:
                raise UnusableShards(
                    f"the split {split!r} has {count} sequences that are long enough to be measured; {paths} paths "
                    f"need at least {wanted[split]}: raise corpus.splits.{split}, give more documents or fewer paths"
                )
        return found

    def _long_enough(self, task: Task, state: State, split: str) -> int:
        count = 0
        for part in local_result(state, task.stage, "BUILD")["ranges"]:
            if part["split"] == split:
                packed = state.tasks[f"{task.stage}/PACK/0/{part['index']}"].outputs["tokens"]
                with TokenFile.open(self._store.path(packed.digest)) as file:
                    count += len(evaluated_positions(file, None))
        return count
