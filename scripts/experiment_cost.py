"""What a run of the experiment takes, by estimate, before it is started. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable

from configs.corpus import CorpusConfig
from configs.schema import Experiment
from dipaco.cloze_items import ENDINGS
from model.layout import num_parameters
from model.topology import Topology
from scripts.experiment_cloze import Cloze
from scripts.experiment_table import Cost

VALIDATION, TEST = "validation", "test"


def core_seconds(cost: Cost, frozen: Experiment, experiment: Experiment, splits: Iterable[str]) -> float:
    """An estimate of what a run takes of one core, from the measured step of the frozen experiment.

    Training scales with parameters and tokens of a step; looking at a sequence (evaluation, scoring) costs a third of
    training on it. A limit to the sequences looked at is of each token file of a split; without one they are not
    counted.
    """
    topology = Topology.from_config(experiment.topology)
    step_s = cost.step_s * _work(experiment) / _work(frozen)
    shards = topology.num_shards + len(experiment.baselines)
    steps = (
        experiment.pretrain.steps if experiment.pretrain else 0
    ) + shards * experiment.phases * experiment.inner_steps
    stopping, router = experiment.early_stopping, experiment.router
    models = topology.num_paths * (1 if stopping is None else 2) + len(experiment.baselines)
    files = {split: _files(cost, experiment.corpus, split) for split in (VALIDATION, TEST, "router", "stop")}
    looked_at = sum(files[split] for split in splits) * models * (experiment.evaluation.max_sequences or 0)
    for stage in experiment.gated:
        looked_at += (stage.candidates or topology.num_paths) * files["router"] * (stage.max_sequences or 0)
    if router is not None:
        steps += router.steps
        looked_at += topology.num_paths * files["router"] * (router.max_sequences or 0)
    if stopping is not None:
        looked_at += experiment.phases // stopping.every * files["stop"] * (stopping.max_sequences or 0)
    assigned = len(experiment.reshards) + (experiment.sharding.kind not in ("all", "random"))
    return cost.other_s + cost.assign_s * assigned + step_s * (steps + looked_at / experiment.inner.batch_rows / 3)


def cloze_seconds(cost: Cost, frozen: Experiment, experiment: Experiment, cloze: Cloze | None) -> float:
    """The same of the cloze, where there is one: every ending is read behind its context and behind BOS.

    By the base, by every baseline and, of a mixture, by two paths an item, whose contexts are read by all.
    """
    if cloze is None:
        return 0.0
    num_paths = Topology.from_config(experiment.topology).num_paths
    models = 1 + len(experiment.baselines)
    versions = 1 if experiment.early_stopping is None else 2
    answering = models + versions * min(num_paths, 2)
    tokens = answering * ENDINGS * (cloze.form.length + 1 + cloze.ending_tokens)
    tokens += versions * num_paths * cloze.context_tokens if num_paths > 1 else 0
    step_tokens = experiment.inner.batch_rows * experiment.model.sequence_length
    return cost.step_s * _work(experiment) / _work(frozen) * cloze.items * tokens / step_tokens / 3


def _files(cost: Cost, corpus: CorpusConfig, split: str) -> int:
    """Token files of a held-out split, of which each holds about `range_characters`; at least one."""
    share: float = getattr(corpus.splits, split)
    return max(1, math.ceil(cost.characters * share / corpus.range_characters))


def _work(experiment: Experiment) -> float:
    """Proportional to the arithmetic of one inner step."""
    vocabulary = 258 if experiment.tokenizer.kind == "bytes" else experiment.tokenizer.vocab_size
    parameters = num_parameters(experiment.model, vocabulary, Topology.from_config(experiment.topology))
    return float(parameters * experiment.inner.batch_rows * experiment.model.sequence_length)
