"""Every published configuration loads, and has the topology that its source describes."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.load import load_config
from configs.schema import Config
from model.layout import module_spec, num_parameters
from model.topology import Topology

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# Without the tables of the experiment, of which each is many runs.
FILES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "experiments")
# name: (paths, shards, modules)
SHAPES = {
    "quickstart": (4, 4, 4),
    "resharded": (4, 4, 4),
    "diloco": (1, 4, 1),
    "flat-experts": (4, 4, 4),
    "dipaco-4x4": (16, 16, 8),
    "path-specific": (4, 4, 8),
    "simulate": (8, 8, 6),
    "simulate-256": (256, 256, 32),
    "paper-dipaco-16x16-150m": (256, 256, 32),
    "paper-diloco-8-150m": (1, 8, 1),
    "many-paths-16x16": (256, 256, 33),
    "many-paths-4x4": (16, 16, 9),
    "tiny": (4, 4, 4),
}


def load(name: str) -> Config:
    return load_config(next(path for path in FILES if path.stem == name))


def vocabulary(config: Config) -> int:
    tokenizer = config.experiment.tokenizer
    return 258 if tokenizer.kind == "bytes" else tokenizer.vocab_size


def total_module_bytes(config: Config) -> int:
    topology = Topology.from_config(config.experiment.topology)
    specs = (module_spec(config.experiment.model, vocabulary(config), topology, each) for each in topology.module_ids)
    return sum(spec.num_bytes for spec in specs)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_loads_under_its_own_name_and_says_where_it_comes_from(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    assert path.read_text(encoding="utf-8").startswith("# ")


def test_the_table_is_complete() -> None:
    assert {path.stem for path in FILES} == set(SHAPES)


@pytest.mark.parametrize("name", SHAPES)
def test_its_topology(name: str) -> None:
    topology = Topology.from_config(load(name).experiment.topology)
    assert (topology.num_paths, topology.num_shards, len(topology.module_ids)) == SHAPES[name]


@pytest.mark.parametrize("name", ["paper-dipaco-16x16-150m", "paper-diloco-8-150m"])
def test_the_papers_paths_have_150_million_parameters(name: str) -> None:
    config = load(name)
    topology = Topology.from_config(config.experiment.topology)
    assert num_parameters(config.experiment.model, vocabulary(config), topology) == pytest.approx(150e6, rel=0.01)
    assert config.experiment.total_steps == pytest.approx(88_000, rel=0.001)


def test_the_grids_of_many_paths_have_equal_module_bytes() -> None:
    assert total_module_bytes(load("many-paths-16x16")) == total_module_bytes(load("many-paths-4x4"))
