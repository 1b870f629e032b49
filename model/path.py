"""Composing a path from the files of its modules, and splitting it into modules again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from configs.schema import ModelConfig
from model import tensor_file
from model.layout import level_tensors, module_spec
from model.topology import Level, Topology
from model.transformer import PathModel


class IncompletePath(ValueError):
    """Modules that do not make one path: a level without a module or with two."""


def compose(
    model: ModelConfig, vocab_size: int, topology: Topology, module_paths: Mapping[str, Path]
) -> dict[str, np.ndarray]:
    """The tensors of a path, as views of its modules' memory-mapped files.

    Raises IncompletePath unless there is one module a level, TensorMismatch where a file is not that module.
    """
    levels = sorted(topology.level_of_module(module_id).index for module_id in module_paths)
    if levels != list(range(len(topology.levels))):
        raise IncompletePath(
            f"modules {sorted(module_paths)} do not make a path: expected one for each of {len(topology.levels)} levels"
        )
    tensors: dict[str, np.ndarray] = {}
    for module_id, path in module_paths.items():
        tensors |= tensor_file.read(path, module_spec(model, vocab_size, topology, module_id).tensors)
    return tensors


def path_from_tensors(model: ModelConfig, vocab_size: int, tensors: Mapping[str, np.ndarray]) -> PathModel:
    """A path with copies of the tensors, which must be exactly its own."""
    path = PathModel(model, vocab_size)
    load_tensors(path, tensors)
    return path


def load_path(
    model_config: ModelConfig, vocab_size: int, topology: Topology, module_paths: Mapping[str, Path]
) -> PathModel:
    """The path made of the modules (id -> tensor file), in float32 on the CPU; raises as `compose`."""
    return path_from_tensors(model_config, vocab_size, compose(model_config, vocab_size, topology, module_paths))


@torch.no_grad()
def load_tensors(path: PathModel, tensors: Mapping[str, np.ndarray]) -> None:
    """Overwrite all parameters of a path."""
    parameters = dict(path.named_parameters())
    if parameters.keys() != tensors.keys():
        raise IncompletePath(f"tensors of a path differ by {sorted(parameters.keys() ^ tensors.keys())}")
    for name, parameter in parameters.items():
        parameter.copy_(torch.from_numpy(np.asarray(tensors[name])))


def share_tensors(path: PathModel, tensors: Mapping[str, Tensor]) -> None:
    """Make the parameters be these tensors, without a copy; whoever else holds them sees the same values."""
    parameters = dict(path.named_parameters())
    if parameters.keys() != tensors.keys():
        raise IncompletePath(f"tensors of a path differ by {sorted(parameters.keys() ^ tensors.keys())}")
    for name, parameter in parameters.items():
        assert parameter.shape == tensors[name].shape, name
        parameter.data = tensors[name]


def module_tensors(path: PathModel, level: Level) -> dict[str, Tensor]:
    """The parameters of the path that its module at `level` holds, by name, detached and shared with the path."""
    parameters = dict(path.named_parameters())
    return {
        tensor.name: parameters[tensor.name].detach() for tensor in level_tensors(path.config, path.vocab_size, level)
    }


def write_module(file: Path, path: PathModel, level: Level) -> tuple[str, int]:
    """Write the path's module at `level` as it is now; returns (SHA-256 hex, size in bytes) of the file."""
    return tensor_file.write(file, {name: tensor.cpu().numpy() for name, tensor in module_tensors(path, level).items()})
