"""Reads the YAML file of a run, tells configurations apart, and says in one sentence what is wrong with one.

The digest follows the rule that only `experiment` decides bits: two runs with the same digest give the same weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from configs.complaint import complaint, shown
from configs.schema import Config

SCHEMA_VERSION = 1
NUMERICS_VERSION = 1
"""Raised whenever the golden numbers change, so that a run of other numerics is never continued by mistake."""


class InvalidConfig(ValueError):
    """A configuration that cannot be run; the message is one sentence with file, key, value and what was expected."""


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a key that stands twice in one mapping is an error instead of a silent last one wins."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key_node.value!r} stands here a second time", key_node.start_mark
                )
            seen.add(str(key_node.value))
        return super().construct_mapping(node, deep=deep)


def load_config(path: Path) -> Config:
    """The configuration in a YAML file, named after the file unless it says otherwise; raises InvalidConfig."""
    return parse_config(text_of(path), source=str(path), default_name=path.name.partition(".")[0])


def text_of(path: Path) -> str:
    """What stands in a configuration file; raises InvalidConfig."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InvalidConfig(f"there is no configuration file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"cannot read the configuration file {path}: {error}") from None


def mapping_in(
    text: str, source: str, key: str = "experiment", loader: type[UniqueKeyLoader] = UniqueKeyLoader
) -> dict[str, Any]:
    """The mapping, with `key` in it, that YAML (or JSON) text holds; raises InvalidConfig."""
    try:
        data = yaml.load(text, Loader=loader)
    except yaml.YAMLError as error:
        raise InvalidConfig(f"{source}{_place(error)}: not valid YAML: {_problem(error)}") from None
    if not isinstance(data, dict):
        raise InvalidConfig(f"{source}: expected a mapping with the key {key!r}, found {shown(data)}")
    return data


def parse_config(text: str, source: str, default_name: str | None = None) -> Config:
    """The configuration in YAML (or JSON) text; `source` stands in front of every complaint. Raises InvalidConfig."""
    data = mapping_in(text, source)
    if default_name is not None:
        data = {"name": default_name} | data
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise InvalidConfig(f"{source}: {complaint(error.errors(), data)}") from None


def to_yaml(config: Config) -> str:
    """The resolved configuration, every default written out."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
    return text


def experiment_digest(config: Config, extra: Mapping[str, str]) -> str:
    """SHA-256 over the experiment, the schema and numerics versions and `extra` (digests of corpus and tokenizer)."""
    identity = {
        "experiment": config.experiment.model_dump(mode="json"),
        "schema": SCHEMA_VERSION,
        "numerics": NUMERICS_VERSION,
        "extra": dict(extra),
    }
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def resume_difference(old: Config, new: Config) -> str | None:
    """The first key under `experiment` in which `new` differs from the run's own `old`; None where it may resume."""
    return _first_difference(
        old.experiment.model_dump(mode="json"), new.experiment.model_dump(mode="json"), "experiment"
    )


def _first_difference(old: Any, new: Any, key: str) -> str | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in old | new:
            found = _first_difference(old.get(name), new.get(name), f"{key}.{name}")
            if found is not None:
                return found
        return None
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (mine, other) in enumerate(zip(old, new, strict=True)):
            found = _first_difference(mine, other, f"{key}[{index}]")
            if found is not None:
                return found
        return None
    return None if old == new else key


def _place(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return "" if mark is None else f":{mark.line + 1}:{mark.column + 1}"


def _problem(error: yaml.YAMLError) -> str:
    return str(getattr(error, "problem", None) or error).splitlines()[0]
