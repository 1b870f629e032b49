"""The coordinator's own tasks: building the corpus, first weights, fitting the router, dividing, summarising.

Small work on the machine that holds the store; each is a function of rows and blobs, so that after a crash it is done
again with the same result. Runs in a thread, off the event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.plan import BASE, MIXTURE, Plan, blob, seed_of
from coordinator.state import State, Task
from model.layout import module_spec
from model.store import BlobStore
from protocol.tasks import BlobRef

SAY_EVERY = 0.25


class Jobs:
    """Runs the local tasks of one run."""

    def __init__(self, plan: Plan, store: BlobStore, say: Callable[[str], None]) -> None:
        self._plan = plan
        self._store = store
        self._say = say
        self._run: dict[str, Callable[[State], dict[str, Any]]] = {
            "BUILD": self._build,
            "INITIALISE": self._initialise,
            "FIT": self._fit,
            "DIVIDE": self._divide,
            "SUMMARISE": self._summarise,
        }

    def run(self, task: Task, state: State) -> dict[str, Any]:
        """The result of a local task, as plain data; a person's mistake raises ValueError with one sentence."""
        return self._run[task.kind](state)

    def _read(self, ref: BlobRef) -> bytes:
        return self._store.path(ref.digest).read_bytes()

    def _outputs(self, state: State, stage: str, kind: str, name: str) -> list[tuple[str, bytes]]:
        """(subject, bytes) of one output of all completed tasks of a kind."""
        tasks = [task for task in state.tasks_of(stage) if task.kind == kind and name in task.outputs]
        return [(task.subject, self._read(task.outputs[name])) for task in tasks]

    # --- corpus and first weights -----------------------------------------------------------------------------------

    def _build(self, state: State) -> dict[str, Any]:
        from corpus.builder import build_corpus

        experiment = self._plan.experiment
        self._say("building the corpus")
        manifest = build_corpus(experiment.corpus, experiment.tokenizer, self._store, self._progress())
        manifest.ranges_of("train")
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

    def _initialise(self, state: State) -> dict[str, Any]:
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

    # --- sharding ---------------------------------------------------------------------------------------------------

    def _fit(self, state: State) -> dict[str, Any]:
        from routing.kmeans import fit
        from routing.records import Features

        parts = [Features.from_bytes(data) for _, data in self._outputs(state, "shard", "FEATURIZE", "features")]
        ids, z = np.concatenate([part.ids for part in parts]), np.concatenate([part.z for part in parts])
        experiment = self._plan.experiment
        clusters = fit(ids, z, experiment.sharding, self._plan.mixture, seed_of(experiment.seed, "router"))
        self._say(f"router: {experiment.sharding.kind} with {clusters.num_shards} shards on {len(z):,} features")
        return {"router": list(self._store.put_bytes(clusters.to_bytes()))}

    def _divide(self, state: State) -> dict[str, Any]:
        from routing.records import Assignments
        from routing.sharding import check_sizes, divide, manifests, merge, random_shards

        experiment, num_shards = self._plan.experiment, self._plan.mixture.num_shards
        ids, lengths = self._training_sequences(state)
        if experiment.sharding.kind == "random":
            shards = random_shards(ids, num_shards, seed_of(experiment.seed, "random shards"))
            router = ""
        else:
            outputs = self._outputs(state, "shard", "FEATURIZE", "assignments")
            shards = divide(
                merge([Assignments.from_bytes(data) for _, data in outputs]), num_shards, experiment.sharding
            )
            ref = self._plan.router(state)
            assert ref is not None
            router = ref.digest
        batch_tokens = experiment.inner.batch_rows * experiment.model.sequence_length
        tokens = check_sizes(shards, ids, lengths, batch_tokens)
        shares = ", ".join(f"{100 * held / sum(tokens):.1f}" for held in tokens[:16])
        self._say(f"shards hold {shares}{' ...' if len(tokens) > 16 else ''} % of the tokens")
        stored = [self._store.put_bytes(m.to_bytes()) for m in manifests(shards, router, experiment.sharding.overlap)]
        return {
            "shards": [
                {"manifest": list(pair), "sequences": len(members), "tokens": held}
                for pair, members, held in zip(stored, shards, tokens, strict=True)
            ]
        }

    def _training_sequences(self, state: State) -> tuple[np.ndarray, np.ndarray]:
        """Ids and lengths of all training sequences, sorted by id."""
        from corpus.token_file import TokenFile

        ids, lengths = [], []
        for part in self._plan.ranges(state, "train"):
            with TokenFile.open(self._store.path(blob(part["file"]).digest)) as file:
                ids.append(np.array(file.ids))
                lengths.append(np.array(file.lengths))
        order = np.argsort(np.concatenate(ids), kind="stable")
        return np.concatenate(ids)[order], np.concatenate(lengths)[order]

    # --- evaluation -------------------------------------------------------------------------------------------------

    def _summarise(self, state: State) -> dict[str, Any]:
        from routing.evaluation import LossTable, RouteTable, summarise
        from routing.records import Losses, Routes

        losses = {
            subject: Losses.from_bytes(data) for subject, data in self._outputs(state, "evaluate", "EVALUATE", "losses")
        }
        evaluation = self._plan.experiment.evaluation
        indices = [part["index"] for part in self._plan.ranges(state, evaluation.split) if part["sequences"]]
        tables = {
            model: LossTable.join(
                [
                    [losses[f"{model}-{path_index}-{index}"] for index in indices]
                    for path_index in range(self._plan.topology(model).num_paths)
                ]
            )
            for model in self._plan.evaluated_models()
        }
        routed = dict(self._outputs(state, "evaluate", "FEATURIZE", "routes"))
        routes = self._in_order(routed, indices, Routes.from_bytes)
        table = RouteTable.join(routes) if routes else None
        summary = summarise(tables, MIXTURE, table, evaluation.routes, self._plan.chunk_tokens())
        return {**summary, "split": evaluation.split}

    @staticmethod
    def _in_order(routed: dict[str, bytes], indices: Iterable[int], decode: Callable[[bytes], Any]) -> list[Any]:
        return [decode(routed[f"route-{index}"]) for index in indices] if routed else []
