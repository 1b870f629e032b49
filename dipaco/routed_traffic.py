"""Many texts and their router: the load on every path, how sure it is, drift from training, agreement with the oracle.

Traffic is compared with training sequences routed in the same way: shards may be capped or overlap, routes do not.
Whether a difference is more than chance is judged by what the sequences are worth, as those of a document go alike:
for loads by the design effect that is seen in them, for features by documents.

Legend: N sequences, P paths.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Float64, Int64

from coordinator.plan import MIXTURE, blob, seed_of
from coordinator.snapshot import RunSnapshot
from coordinator.state import Version
from corpus.token_file import TokenFile
from dipaco.ending import Refused
from dipaco.evaluation import Evaluation, Text, tokenized
from dipaco.routed_text import described
from dipaco.run_router import RunRouter, open_router
from dipaco.training_sample import take_sample
from model.store import BlobStore
from routing.agreement import agreement
from routing.drift import FeatureDrift, index_by_chance, jensen_shannon, stability_index, verdict
from routing.features import first_prefix
from routing.load import PathLoad
from routing.records import MIN_EVALUATED_TOKENS, evaluated_positions

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_DECILES = 10
_SLICE_SEQUENCES = 1024


class Routed:
    """What a router makes of sequences: their paths, and the posterior of the path that each takes."""

    def __init__(self, num_paths: int) -> None:
        self.load = PathLoad(num_paths)
        self._paths: list[npt.NDArray[np.uint16]] = []
        self._tops: list[npt.NDArray[np.float32]] = []

    def add(self, posteriors: Sequence[Float64[np.ndarray, "N P"]], documents: npt.NDArray[Any]) -> None:
        """Some more sequences, in parts, with the documents that they belong to."""
        paths = np.concatenate([part.argmax(axis=1) for part in posteriors])
        self.load.add(paths, documents)
        self._paths.append(paths.astype(np.uint16))
        self._tops += [part.max(axis=1).astype(np.float32) for part in posteriors]

    @property
    def paths(self) -> Int64[np.ndarray, " N"]:
        """The path of every sequence."""
        paths: npt.NDArray[np.int64] = np.concatenate(self._paths).astype(np.int64)
        return paths

    def confidence(self) -> dict[str, Any]:
        """Mean and quantiles of the highest posterior."""
        tops = np.concatenate(self._tops).astype(np.float64)
        quantiles = np.quantile(tops, QUANTILES)
        return {
            "mean": float(tops.mean()),
            "quantiles": dict(zip(map(str, QUANTILES), quantiles.tolist(), strict=True)),
        }


def route_traffic(
    snapshot: RunSnapshot,
    data: Path,
    *,
    oracle: bool,
    sample: int,
    version: Version = "last",
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The loads and drift of a file's documents; `sample` training sequences are what they are compared with.

    `version`: of the paths that the oracle compares. Raises Refused, RunUnusable, BadCorpus, DamagedModule; with
    `oracle` what an evaluation raises.
    """
    router = open_router(snapshot)
    if oracle:
        snapshot.paths(MIXTURE, version)
    with tempfile.TemporaryDirectory(prefix="dipaco-data-") as scratch:
        say(f"reading {data}")
        text = tokenized(snapshot, data, BlobStore(Path(scratch)))
        traffic = _Traffic(snapshot, router, text, say)
        return traffic.report(str(data), oracle=version if oracle else None, sample=sample)


class _Traffic:
    """The traffic in some token files, against one run."""

    def __init__(self, snapshot: RunSnapshot, router: RunRouter, text: Text, say: Callable[[str], None]) -> None:
        self._snapshot, self._router, self._text, self._say = snapshot, router, text, say
        self._num_paths = router.frozen.num_paths
        self._live = Routed(self._num_paths)
        self._tokens, self._short = 0, 0

    def report(self, data: str, *, oracle: Version | None, sample: int) -> dict[str, Any]:
        training, drift = self._training(sample) if sample else (None, None)
        self._read(drift)
        sequences, tokens = self._shard_shares()
        return {
            "run": self._snapshot.config.name,
            "router": described(self._router),
            "data": data,
            "documents": self._live.load.documents,
            "sequences": self._live.load.sequences,
            "tokens": self._tokens,
            "short_sequences": self._short,
            "load": self._by_path(self._live.load.shares),
            "training_load": training and self._by_path(training.load.shares),
            "shard_sequences": self._by_path(sequences),
            "shard_tokens": self._by_path(tokens),
            "confidence": self._live.confidence(),
            "training_confidence": training and training.confidence(),
            "drift": {
                "path_load": training and self._load_drift(training),
                "jensen_shannon_to_shard_sequences": jensen_shannon(self._live.load.shares, sequences),
                "jensen_shannon_to_shard_tokens": jensen_shannon(self._live.load.shares, tokens),
                "features": training and drift and self._feature_drift(drift, training),
            },
            "oracle": self._oracle(oracle) if oracle else None,
        }

    def _training(self, sequences: int) -> tuple[Routed, FeatureDrift]:
        """A sample of all training sequences, routed as traffic is."""
        snapshot = self._snapshot
        parts = [part for part in snapshot.plan.ranges(snapshot.state, "train") if part["sequences"]]
        files = [snapshot.store.path(blob(part["file"]).digest) for part in parts]
        sample = take_sample(
            files, self._router, sequences, seed_of(snapshot.config.experiment.seed, "route"), self._say
        )
        routed = Routed(self._num_paths)
        routed.add([self._router.frozen.posterior(sample.z)], sample.documents)
        return routed, FeatureDrift(self._router.frozen.transform(sample.z))

    def _read(self, drift: FeatureDrift | None) -> None:
        """Route all sequences of the traffic, slice by slice."""
        prefix_tokens, frozen = self._router.frozen.prefix_tokens, self._router.frozen
        done = 0
        for path in self._files():
            with TokenFile.open(path) as file:
                posteriors = []
                self._tokens += file.num_tokens - file.count
                self._short += int((file.lengths < prefix_tokens + 1).sum())
                for start in range(0, file.count, _SLICE_SEQUENCES):
                    positions = range(start, min(start + _SLICE_SEQUENCES, file.count))
                    z = self._router.features([first_prefix(file.tokens(each), prefix_tokens) for each in positions])
                    posteriors.append(frozen.posterior(z))
                    if drift is not None:
                        drift.add(frozen.transform(z))
                    done += len(positions)
                    self._say(f"routed {done:,} sequences")
                self._live.add(posteriors, file.documents)

    def _files(self) -> list[Path]:
        return [self._text.store.path(file.digest) for file in self._text.files]

    def _shard_shares(self) -> tuple[Float64[np.ndarray, " P"], Float64[np.ndarray, " P"]]:
        """What share of the shards' sequences, and of their training tokens, each path has."""
        sequences, tokens = np.zeros(self._num_paths), np.zeros(self._num_paths)
        for shard in self._snapshot.state.shards_of(MIXTURE):
            sequences[shard.path_index] += shard.sequences
            tokens[shard.path_index] += shard.training_tokens
        return sequences / sequences.sum(), tokens / tokens.sum()

    def _load_drift(self, training: Routed) -> dict[str, Any]:
        live, trained = self._live.load, training.load
        psi = float(stability_index(live.counts, trained.counts))
        by_chance = index_by_chance(self._num_paths, live.effective_size, trained.effective_size)
        return {
            "psi": psi,
            "psi_by_chance": by_chance,
            "verdict": verdict(psi, by_chance),
            "jensen_shannon": jensen_shannon(live.shares, trained.shares),
            "effective_sizes": [live.effective_size, trained.effective_size],
        }

    def _feature_drift(self, drift: FeatureDrift, training: Routed) -> dict[str, Any] | None:
        summary = drift.summary()
        if summary is None:
            return None
        live, trained = float(self._live.load.documents), float(training.load.documents)
        by_chance = index_by_chance(_DECILES, live, trained)
        return {
            "features": summary.features,
            "psi_median": summary.psi_median,
            "psi_highest": summary.psi_highest,
            "psi_above_0.25": summary.psi_above_large,
            "psi_by_chance": by_chance,
            "verdict": verdict(summary.psi_median, by_chance),
            "rms_shift": summary.rms_shift,
            "rms_shift_by_chance": math.sqrt(1 / live + 1 / trained),
            "largest": [{"feature": name, "psi": psi, "shift": shift} for name, psi, shift in summary.largest],
        }

    def _oracle(self, version: Version) -> dict[str, Any]:
        """Agreement with the path of the lowest loss, on the sequences that an evaluation counts."""
        table = Evaluation(self._snapshot, self._text, ["oracle:sequence"], self._say).losses(MIXTURE, version)
        if not table.tokens:
            raise Refused(
                f"no document of the text has the {MIN_EVALUATED_TOKENS} tokens that --oracle needs; "
                "give longer documents, or leave --oracle out"
            )
        found = agreement(table, self._live.paths[self._evaluated()])
        measured = asdict(found)
        measured["best_path"] = self._snapshot.topology.path_id(found.best_path)
        measured["oracle_load"] = self._by_path(found.oracle_load)
        return measured

    def _evaluated(self) -> Int64[np.ndarray, " N"]:
        """Indices into all sequences of those that are evaluated."""
        first, found = 0, []
        for path in self._files():
            with TokenFile.open(path) as file:
                found.append(first + evaluated_positions(file, None))
                first += file.count
        return np.concatenate(found)

    def _by_path(self, values: npt.NDArray[np.float64]) -> dict[str, float]:
        path_id = self._snapshot.topology.path_id
        return {path_id(path_index): float(value) for path_index, value in enumerate(values)}
