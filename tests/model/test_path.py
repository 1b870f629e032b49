from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.schema import LevelConfig, ModelConfig
from model import tensor_file
from model.path import IncompletePath, load_path, load_tensors, module_tensors, share_tensors, write_module
from model.tensor_file import TensorMismatch
from model.topology import Topology
from tests.model.conftest import TWO_BY_TWO, VOCAB_SIZE, tiny_model, topology

WriteModules = Callable[[ModelConfig, Topology], dict[str, Path]]


@pytest.mark.parametrize("tied", [True, False])
def test_composing_and_splitting_give_the_same_bytes(tmp_path: Path, write_modules: WriteModules, tied: bool) -> None:
    model, grid = tiny_model(tie_embeddings=tied, qk_norm=True), topology(TWO_BY_TWO)
    files = write_modules(model, grid)
    for path_index in range(grid.num_paths):
        chosen = {module_id: files[module_id] for module_id in grid.modules_of_path(path_index)}
        path = load_path(model, VOCAB_SIZE, grid, chosen)
        for level, module_id in zip(grid.levels, chosen, strict=True):
            write_module(tmp_path / "again", path, level)
            assert (tmp_path / "again").read_bytes() == files[module_id].read_bytes()


def test_a_loaded_path_does_not_write_to_its_files(write_modules: WriteModules) -> None:
    model, grid = tiny_model(), topology(TWO_BY_TWO)
    files = write_modules(model, grid)
    before = files["0.1"].read_bytes()
    path = load_path(model, VOCAB_SIZE, grid, {"0.1": files["0.1"], "1.0": files["1.0"]})
    with torch.no_grad():
        for parameter in path.parameters():
            parameter.zero_()
    assert files["0.1"].read_bytes() == before
    assert not any(tensor.any() for tensor in module_tensors(path, grid.levels[0]).values())


def test_what_is_no_path_is_refused(write_modules: WriteModules) -> None:
    model, grid = tiny_model(), topology(TWO_BY_TWO)
    files = write_modules(model, grid)
    for chosen in (["0.0"], ["0.0", "0.1"], ["0.0", "0.1", "1.0"]):
        with pytest.raises(IncompletePath, match="2 levels"):
            load_path(model, VOCAB_SIZE, grid, {module_id: files[module_id] for module_id in chosen})
    with pytest.raises(TensorMismatch, match=r"lacks model\.layers\.2"):
        load_path(model, VOCAB_SIZE, grid, {"0.0": files["0.0"], "1.0": files["0.1"]})
    with pytest.raises(TensorMismatch, match="embed_tokens"):
        load_path(model, VOCAB_SIZE + 1, grid, {"0.0": files["0.0"], "1.0": files["1.0"]})


def test_tensors_of_another_path_are_refused(write_modules: WriteModules) -> None:
    model, grid = tiny_model(), topology([LevelConfig(modules=1, blocks=[0, 1, 2, 3], embedding=True, head=True)])
    files = write_modules(model, grid)
    path = load_path(model, VOCAB_SIZE, grid, files)
    tensors = tensor_file.read(files["0.0"])
    del tensors["model.norm.weight"]
    with pytest.raises(IncompletePath, match=r"model\.norm\.weight"):
        load_tensors(path, tensors)


def test_shared_tensors_are_not_copied(write_modules: WriteModules) -> None:
    model, grid = tiny_model(), topology([LevelConfig(modules=1, blocks=[0, 1, 2, 3], embedding=True, head=True)])
    files = write_modules(model, grid)
    tensors = {name: torch.from_numpy(np.array(view)) for name, view in tensor_file.read(files["0.0"]).items()}
    path = load_path(model, VOCAB_SIZE, grid, files)
    share_tensors(path, tensors)
    assert all(parameter.data_ptr() == tensors[name].data_ptr() for name, parameter in path.named_parameters())
