"""Levels, modules, paths and shards as plain indices: which module a path picks, whose contributions a module takes.

Pure Python, no torch. DiPaCo (2403.10616) Sec 2.2; a level with `per_path` holds path-specific modules (Sec 4.2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from configs.schema import TopologyConfig


class UnknownPath(ValueError):
    """A path id that the topology does not have."""


@dataclass(frozen=True, slots=True)
class Level:
    """One level of the topology and the parts of the transformer that its modules hold."""

    index: int
    num_modules: int
    blocks: tuple[int, ...]
    embedding: bool
    head: bool
    per_path: bool


@dataclass(frozen=True)
class Topology:
    """All paths through the levels, in row-major order; `replicas` shards train each path."""

    levels: tuple[Level, ...]
    replicas: int = 1

    @classmethod
    def from_config(cls, config: TopologyConfig) -> Topology:
        """The topology that `config` describes; its levels were checked against the model by the schema."""
        num_paths = math.prod(level.modules for level in config.levels if isinstance(level.modules, int))
        levels = tuple(
            Level(
                index=index,
                num_modules=level.modules if isinstance(level.modules, int) else num_paths,
                blocks=tuple(sorted(level.blocks)),
                embedding=level.embedding,
                head=level.head,
                per_path=level.modules == "path",
            )
            for index, level in enumerate(config.levels)
        )
        return cls(levels, config.replicas)

    def dense(self) -> Topology:
        """The one path with the same levels and one module each: the base every path is forked from."""
        levels = tuple(
            Level(level.index, 1, level.blocks, level.embedding, level.head, per_path=False) for level in self.levels
        )
        return Topology(levels, replicas=1)

    @cached_property
    def _grid(self) -> tuple[Level, ...]:
        """The levels whose choice distinguishes paths."""
        return tuple(level for level in self.levels if not level.per_path)

    @cached_property
    def num_paths(self) -> int:
        return math.prod(level.num_modules for level in self._grid)

    @property
    def num_shards(self) -> int:
        return self.num_paths * self.replicas

    def module_indices(self, path_index: int) -> tuple[int, ...]:
        """The module that the path picks at each level."""
        if not 0 <= path_index < self.num_paths:
            raise UnknownPath(f"path index {path_index} is not in 0..{self.num_paths - 1}")
        remainder, picks = path_index, dict[int, int]()
        for level in reversed(self._grid):
            remainder, picks[level.index] = divmod(remainder, level.num_modules)
        return tuple(path_index if level.per_path else picks[level.index] for level in self.levels)

    def modules_of_path(self, path_index: int) -> tuple[str, ...]:
        """Module ids `level.module`, one a level."""
        return tuple(f"{level}.{module}" for level, module in enumerate(self.module_indices(path_index)))

    def path_id(self, path_index: int) -> str:
        """Dotted indices over the levels that offer a choice; `0` where there is one path only."""
        picks = self.module_indices(path_index)
        named = [str(picks[level.index]) for level in self._grid if level.num_modules > 1]
        return ".".join(named) or "0"

    def path_index(self, path_id: str) -> int:
        """The inverse of `path_id`; raises UnknownPath."""
        try:
            return self._path_indices[path_id]
        except KeyError:
            last = self.path_id(self.num_paths - 1)
            raise UnknownPath(f"there is no path {path_id!r}; paths run from {self.path_id(0)} to {last}") from None

    @cached_property
    def _path_indices(self) -> dict[str, int]:
        return {self.path_id(path_index): path_index for path_index in range(self.num_paths)}

    def path_of_shard(self, shard: int) -> int:
        return shard // self.replicas

    @cached_property
    def module_ids(self) -> tuple[str, ...]:
        return tuple(f"{level.index}.{module}" for level in self.levels for module in range(level.num_modules))

    def level_of_module(self, module_id: str) -> Level:
        return self.levels[int(module_id.partition(".")[0])]

    @cached_property
    def _shards_of_module(self) -> dict[str, tuple[int, ...]]:
        shards: dict[str, list[int]] = {module_id: [] for module_id in self.module_ids}
        for shard in range(self.num_shards):
            for module_id in self.modules_of_path(self.path_of_shard(shard)):
                shards[module_id].append(shard)
        return {module_id: tuple(members) for module_id, members in shards.items()}

    def shards_of_module(self, module_id: str) -> tuple[int, ...]:
        """The shards that contribute to the module, ascending: the order in which contributions are added."""
        return self._shards_of_module[module_id]
