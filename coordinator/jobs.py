"""The coordinator's own tasks: building the corpus, first weights, fitting the router, dividing, summarising.

Small work on the machine that holds the store; each is a function of rows and blobs, so that after a crash it is done
again with the same result. Runs in a thread, off the event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coordinator.evaluation_steps import BEST_OF_MIXTURE, REPORTED
from coordinator.held_out import HeldOut
from coordinator.plan import BASE, MIXTURE, Plan, seed_of
from coordinator.router_jobs import RouterJobs
from coordinator.sharding_jobs import ShardingJobs
from coordinator.state import State, Task
from coordinator.task_outputs import outputs_of
from model.layout import module_spec
from model.store import BlobStore

if TYPE_CHECKING:
    from routing.records import Losses
    from routing.tables import LossTable

SAY_EVERY = 0.25


class Jobs:
    """Runs the local tasks of one run."""

    def __init__(self, plan: Plan, store: BlobStore, say: Callable[[str], None]) -> None:
        self._plan = plan
        self._store = store
        self._say = say
        sharding = ShardingJobs(plan, store, say)
        self._run: dict[str, Callable[[Task, State], dict[str, Any]]] = {
            "BUILD": self._build,
            "INITIALISE": self._initialise,
            "CHECK": HeldOut(plan, store).check,
            "FIT": sharding.fit,
            "SELECT": sharding.select,
            "GATE": sharding.gate,
            "DIVIDE": sharding.divide,
            "LABEL": RouterJobs(plan, store, say).label,
            "SUMMARISE": self._summarise,
        }

    def run(self, task: Task, state: State) -> dict[str, Any]:
        """The result of a local task, as plain data; a person's mistake raises ValueError with one sentence."""
        return self._run[task.kind](task, state)

    # --- corpus and first weights -----------------------------------------------------------------------------------

    def _build(self, task: Task, state: State) -> dict[str, Any]:
        from corpus.builder import build_corpus
        from corpus.tokenizer import BadTokenizer

        experiment = self._plan.experiment
        self._say("building the corpus")
        manifest = build_corpus(experiment.corpus, experiment.tokenizer, self._store, self._progress())
        manifest.ranges_of("train")
        if experiment.gated or experiment.router:
            manifest.ranges_of("router")
        if experiment.router and manifest.vocab_size < self._plan.mixture.num_paths:
            raise BadTokenizer(
                f"the router LM scores {self._plan.mixture.num_paths} paths by as many tokens of the vocabulary, and "
                f"the tokenizer has {manifest.vocab_size}; use a larger one, fewer paths, or no router stage"
            )
        if experiment.early_stopping is not None:
            manifest.ranges_of("stop")
        if experiment.evaluates:
            manifest.ranges_of(experiment.evaluation.split)
        characters = sum(part.characters for part in manifest.ranges)
        documents = sum(part.documents for part in manifest.ranges)
        self._say(
            f"corpus: {documents:,} documents, {characters:,} characters in {len(manifest.domains)} domains, "
            f"vocabulary of {manifest.vocab_size}"
        )
        stored = self._store.put_bytes(manifest.to_bytes())
        return {
            "manifest": list(stored),
            "digest": manifest.digest,
            "tokenizer": list(manifest.tokenizer),
            "vocab_size": manifest.vocab_size,
            "domains": list(manifest.domains),
            "ranges": [
                {
                    "index": part.index,
                    "split": part.split,
                    "text": [part.digest, part.size],
                    "documents": part.documents,
                    "characters": part.characters,
                }
                for part in manifest.ranges
            ],
        }

    def _progress(self) -> Callable[[str, int, int], None]:
        """Say how far a build is, at every quarter of what is expected (or every 100 million characters)."""
        said: dict[str, int] = {}

        def progress(what: str, done: int, expected: int) -> None:
            step = int(expected * SAY_EVERY) or 100_000_000
            if done // step > said.get(what, 0):
                said[what] = done // step
                self._say(f"{what}: {done:,}{f' of at most {expected:,}' if expected > 1 else ''}")

        return progress

    def _initialise(self, task: Task, state: State) -> dict[str, Any]:
        from model.initial import write_initial_module

        experiment, vocab_size = self._plan.experiment, self._plan.vocab_size(state)
        if experiment.model.init_from is not None:
            return {"modules": self._import(Path(experiment.model.init_from), vocab_size)}
        modules = {}
        for module_id in self._plan.dense.module_ids:
            spec = module_spec(experiment.model, vocab_size, self._plan.dense, module_id)
            path = self._store.scratch() / "module"
            digest, size = write_initial_module(path, spec, experiment.model, seed_of(experiment.seed, BASE))
            self._store.adopt(path, digest)
            modules[module_id] = [digest, size]
        return {"modules": modules}

    def _import(self, checkpoint: Path, vocab_size: int) -> dict[str, Any]:
        from model.hugging_face import import_modules

        model, dense = self._plan.experiment.model, self._plan.dense
        imported = import_modules(checkpoint, model, vocab_size, dense, self._store.scratch())
        modules = {}
        for module_id, path in imported.items():
            modules[module_id] = list(self._store.put_file(path))
        return modules

    # --- evaluation -------------------------------------------------------------------------------------------------

    def _summarise(self, task: Task, state: State) -> dict[str, Any]:
        from routing.evaluation import RouteTable, beside, summarise
        from routing.records import Losses, Routes

        evaluated = outputs_of(self._store, state, task.stage, "EVALUATE", "losses")
        losses = {subject: Losses.from_bytes(data) for subject, data in evaluated}
        evaluation = self._plan.experiment.evaluation
        indices = [part["index"] for part in self._plan.ranges(state, evaluation.split) if part["sequences"]]
        tables = {model: self._table(losses, model, indices) for model in self._plan.evaluated_models()}
        routed = dict(outputs_of(self._store, state, task.stage, "FEATURIZE", "routes"))
        table, looks = (
            RouteTable.join([Routes.from_bytes(routed[f"{mode}-{index}"]) for index in indices])
            if any(subject.startswith(f"{mode}-") for subject in routed)
            else None
            for mode in ("route", "look")
        )
        summary = summarise(tables, MIXTURE, table, evaluation.routes, self._plan.chunk_tokens(), looks=looks)
        if MIXTURE in tables and self._plan.experiment.early_stopping is not None:
            changed = {
                subject.replace(BEST_OF_MIXTURE, MIXTURE): record
                for subject, record in losses.items()
                if subject.startswith(f"{BEST_OF_MIXTURE}-")
            }
            best = self._table(losses | changed, MIXTURE, indices)
            chunk_tokens = self._plan.chunk_tokens()
            at_best = summarise(
                {MIXTURE: best}, MIXTURE, table, evaluation.routes, chunk_tokens, REPORTED["best"], looks
            )
            summary = beside(summary, at_best)
        return {**summary, "split": evaluation.split}

    def _table(self, losses: Mapping[str, Losses], model: str, indices: Sequence[int]) -> LossTable:
        """The losses of a model from those of its paths in token files, by subject."""
        from routing.tables import LossTable

        paths = range(self._plan.topology(model).num_paths)
        return LossTable.join([[losses[f"{model}-{path_index}-{index}"] for index in indices] for path_index in paths])
