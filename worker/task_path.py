"""The path that a task computes on: which topology its model has, and its modules composed on the task's device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from configs.schema import Experiment
from model.path import load_path
from model.topology import Topology
from model.transformer import PathModel
from protocol.tasks import PathRef
from worker.numerics import Compute

MIXTURE, BASE = "mixture", "base"


def topology_of(experiment: Experiment, model: str) -> Topology:
    """The topology of a model of the run: the mixture's own, else one module a level."""
    topology = Topology.from_config(experiment.topology)
    return topology if model == MIXTURE else topology.dense()


def path_for_task(
    ref: PathRef, experiment: Experiment, vocab_size: int, module_paths: Mapping[str, Path], compute: Compute
) -> PathModel:
    """The path in float32 on the device; raises IncompletePath and TensorMismatch."""
    topology = topology_of(experiment, ref.model)
    return load_path(experiment.model, vocab_size, topology, module_paths).to(compute.device)


def path_for_reading(
    ref: PathRef, experiment: Experiment, vocab_size: int, module_paths: Mapping[str, Path], compute: Compute
) -> PathModel:
    """The same for evaluation and features: nothing in it takes gradients."""
    return path_for_task(ref, experiment, vocab_size, module_paths, compute).eval().requires_grad_(False)
