"""How many phases a simulated run needs so that its plan has enough kills; computed before it starts. Pure.

A task takes about 6 floating point operations a parameter and token (Kaplan et al., 2001.08361, Sec 2.1), and the
machine is taken to be a fast one, so that the estimate errs towards a longer run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from configs.schema import Config
from dipaco.ending import Refused
from model.layout import num_parameters
from model.topology import Topology

FLOPS_PER_CORE_S = 50e9


def phase_s(config: Config, num_workers: int, cores: int) -> float:
    """Seconds of one phase of a train stage without faults, baselines beside it."""
    experiment = config.experiment
    topology = Topology.from_config(experiment.topology)
    vocab_size = 258 if experiment.tokenizer.kind == "bytes" else experiment.tokenizer.vocab_size
    tokens = experiment.inner.batch_rows * experiment.model.sequence_length
    flops = 6.0 * num_parameters(experiment.model, vocab_size, topology) * tokens * experiment.inner_steps
    tasks = topology.num_shards + len(experiment.baselines)
    return flops / FLOPS_PER_CORE_S * math.ceil(tasks / max(1, min(num_workers, cores)))


def lengthened(config: Config, one_phase_s: float, wanted: Sequence[tuple[Sequence[float], int]]) -> Config:
    """The run with so many phases that it lasts until the plan's n-th kill, for every (times of kills, n).

    Raises Refused where the plan has too few, or the run no train stage.
    """
    until_s = 0.0
    for times, count in wanted:
        if count > len(times):
            raise Refused(f"the fault plan has {len(times)} kills of a kind of which {count} are asked for")
        if count:
            until_s = max(until_s, times[count - 1])
    if until_s == 0.0:
        return config
    if not config.experiment.trains:
        raise Refused("--min-worker-kills and --min-coordinator-kills lengthen the train stage, and this run has none")
    missing = max(0, math.ceil(until_s / one_phase_s) - config.experiment.phases)
    document = config.model_dump(mode="json")
    [*_, last] = (stage for stage in document["experiment"]["stages"] if stage["kind"] == "train")
    last["phases"] += missing
    return Config.model_validate(document)
