"""What early stopping needs of the rest of a configuration, said in one sentence where it is not there."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from configs.load import InvalidConfig, experiment_digest, parse_config
from configs.schema import Config

TEXT = """
experiment:
  model: {blocks: 1, hidden_size: 8, heads: 2, intermediate_size: 8, sequence_length: 64}
  topology: {levels: [{modules: 2, blocks: [0], embedding: true, head: true}]}
  sharding: {kind: random}
  stages: [{kind: shard}, {kind: train, phases: 2, inner_steps: 1}]
"""


def parsed(**changes: Any) -> Config:
    data = yaml.safe_load(TEXT)
    data["experiment"] |= changes
    return parse_config(yaml.safe_dump(data), "run.yaml", default_name="run")


def test_an_empty_section_turns_it_on_with_its_defaults() -> None:
    assert parsed().experiment.early_stopping is None
    on = parsed(early_stopping={})
    assert on.experiment.early_stopping is not None
    assert (on.experiment.early_stopping.every, on.experiment.early_stopping.max_sequences) == (1, None)
    assert experiment_digest(on, {}) != experiment_digest(parsed(), {})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"corpus": {"splits": {"stop": 0.0}}}, "measures the stop split: set corpus.splits.stop above 0"),
        ({"stages": [{"kind": "shard"}]}, "chooses among the versions of a train stage, and stages has none"),
        ({"early_stopping": {"every": 0}}, r"early_stopping\.every is 0, expected a value above 0"),
        ({"baselines": [{"name": "train-2"}]}, "baseline 'train-2' has the name of a stage; take another"),
        ({"baselines": [{"name": "dipaco-best"}]}, "must differ from one another and from base, dipaco, dipaco-best"),
        ({"early_stopping": {"patience": 3}}, r"unknown key experiment\.early_stopping\.patience"),
    ],
)
def test_what_it_lacks_is_named(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidConfig, match=sentence):
        parsed(**{"early_stopping": {}, **changes})
