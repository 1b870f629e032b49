from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.load import (
    InvalidConfig,
    experiment_digest,
    load_config,
    parse_config,
    resume_difference,
    to_yaml,
)

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
QUICKSTART = CONFIGS / "quickstart.yaml"
DELETE = object()


def changed(key: str, value: Any) -> str:
    """The quickstart's YAML with one key set, or taken away."""
    document: Any = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))
    *parents, last = [int(part) if part.isdigit() else part for part in key.split("/")]
    place = document
    for part in parents:
        place = place[part] if isinstance(part, int) else place.setdefault(part, {})
    if value is DELETE:
        del place[last]
    else:
        place[last] = value
    return yaml.safe_dump(document)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        (
            "experiment/model/hiden_size",
            3,
            "unknown key experiment.model.hiden_size (value 3); did you mean 'hidden_size'?",
        ),
        ("exekution", {}, "unknown key exekution (value {}); did you mean 'execution'?"),
        ("experiment/model/blocks", "four", 'experiment.model.blocks is "four", expected a whole number'),
        ("experiment/model/blocks", 4.5, "experiment.model.blocks is 4.5, expected a whole number"),
        ("experiment/model/blocks", -1, "experiment.model.blocks is -1, expected a value above 0"),
        ("experiment/model/blocks", DELETE, "key experiment.model.blocks is missing"),
        ("experiment/stages/0/steps", "x", 'experiment.stages[0].steps is "x", expected a whole number'),
        ("experiment/stages/0/steps", DELETE, "key experiment.stages[0].steps is missing"),
        ("experiment/stages/0/kind", DELETE, "key experiment.stages[0].kind is missing"),
        (
            "experiment/stages/0/kind",
            "pretrian",
            "experiment.stages[0].kind is \"pretrian\", expected one of 'pretrain', 'shard', 'train', 'reshard', "
            "'gater', 'router', 'evaluate'",
        ),
        (
            "experiment/topology/levels/0/modules",
            "all",
            "experiment.topology.levels[0].modules is \"all\", expected a whole number or 'path'",
        ),
        ("experiment/corpus/source", {"kind": "files"}, "key experiment.corpus.source.paths is missing"),
        (
            "experiment/corpus/source",
            {"kind": "files", "paths": "a"},
            'experiment.corpus.source.paths is "a", expected a list',
        ),
        ("experiment/inner/learning_rate", 0, "experiment.inner.learning_rate is 0, expected a value above 0.0"),
        ("experiment", 3, "experiment is 3, expected a mapping"),
    ],
)
def test_a_mistake_is_told_by_key_value_and_expectation(key: str, value: Any, sentence: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        parse_config(changed(key, value), "x.yaml", "x")
    assert str(caught.value) == f"x.yaml: {sentence}"


def test_a_grid_that_does_not_add_up_names_blocks_and_levels() -> None:
    with pytest.raises(InvalidConfig, match=r"hold blocks \[0, 1, 2, 3\], but model.blocks is 6") as caught:
        parse_config(changed("experiment/model/blocks", 6), "x.yaml", "x")
    assert "\n" not in str(caught.value)


def test_several_mistakes_are_counted() -> None:
    text = changed("experiment/model", {"blocks": 4, "hidden_size": "x", "heads": 0})
    with pytest.raises(InvalidConfig, match=r"hidden_size is \"x\", .* \(and 3 more wrong keys\)$"):
        parse_config(text, "x.yaml", "x")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: [1,", r"x.yaml:1:7: not valid YAML"),
        ("a: 1\na: 2", r"x.yaml:2:1: not valid YAML: key 'a' stands here a second time"),
        ("", r"x.yaml: expected a mapping with the key 'experiment', found null"),
        ("- 1", r"x.yaml: expected a mapping with the key 'experiment', found \[1\]"),
    ],
)
def test_what_is_not_a_mapping_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(InvalidConfig, match=sentence) as caught:
        parse_config(text, "x.yaml")
    assert "\n" not in str(caught.value)


def test_a_misspelt_key_is_named_rather_than_the_one_it_leaves_missing() -> None:
    tiny = Path(__file__).resolve().parents[2] / "configs" / "tests" / "tiny.yaml"
    text = tiny.read_text(encoding="utf-8")
    with pytest.raises(InvalidConfig, match=r"unknown key experiment\.model\.hidden_sise.*hidden_size"):
        parse_config(text.replace("hidden_size", "hidden_sise"), "tiny.yaml")


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("experiment/evaluation/routes", ["every:0"], r"experiment\.evaluation\.routes\[0\]"),
        ("execution/heartbeat_s", 15.0, r"lease_s \(12\) must be at least 3 times heartbeat_s \(15\)"),
        (
            "experiment/outer/average",
            "median",
            r"'median' needs a module with at least 3 .* has more than 2: add replicas",
        ),
        ("experiment/outer", {"average": "trimmed_mean", "trim_share": 0.5}, r"trim_share is 0\.5"),
        ("experiment/baselines/0/outer/average", "median", r"'median' is for kind 'nesterov'; 'assign' takes one"),
        ("experiment/baselines/1/outer/average", "median", r"'dense-nesterov' has one contribution; .* must be mean"),
        ("experiment/inner/optimizer", "lion", r"inner\.optimizer is \"lion\", expected one of 'adamw' or 'muon'"),
        ("experiment/inner/muon", {"momentum": 0.9}, r"inner\.muon is for optimizer 'muon', .* is 'adamw'"),
        ("experiment/inner/muon", {"momentum": 1.0}, r"inner\.muon\.momentum is 1\.0, expected a value below 1"),
        ("experiment/inner/muon", {"newton_schulz_steps": 0}, r"newton_schulz_steps is 0, expected a value above 0"),
        ("execution/audit_share", 1.5, r"audit_share is 1\.5"),
        ("execution/quarantine_factor", 1.0, r"quarantine_factor is 1\.0"),
    ],
)
def test_what_could_never_go_well_is_refused_before_the_start(key: str, value: Any, sentence: str) -> None:
    with pytest.raises(InvalidConfig, match=sentence):
        parse_config(changed(key, value), "changed.yaml")


def test_a_robust_average_is_taken_where_a_module_has_three_contributions_and_changes_the_digest() -> None:
    mean = parse_config(changed("experiment/topology/replicas", 2), "x.yaml")
    text = to_yaml(mean).replace("average: mean", "average: median", 1)
    median = parse_config(text, "x.yaml")
    assert median.experiment.outer.average == "median"
    assert experiment_digest(median, {}) != experiment_digest(mean, {})


def test_a_missing_or_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"there is no configuration file nowhere\.yaml"):
        load_config(Path("nowhere.yaml"))
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9")
    with pytest.raises(InvalidConfig, match=r"cannot read the configuration file .*latin\.yaml"):
        load_config(tmp_path / "latin.yaml")


def test_the_name_defaults_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(changed("name", DELETE), encoding="utf-8")
    assert load_config(path).name == "mine"
    assert load_config(QUICKSTART).name == "quickstart"


def test_yaml_of_a_config_reads_back_as_the_same_config() -> None:
    config = load_config(QUICKSTART)
    assert parse_config(to_yaml(config), "x.yaml") == config


def test_only_the_experiment_and_what_it_read_decide_the_digest() -> None:
    config = load_config(QUICKSTART)
    extra = {"corpus": "c", "tokenizer": "t"}
    digest = experiment_digest(config, extra)
    patient = parse_config(changed("execution/lease_s", 99.0), "x.yaml")
    other_seed = parse_config(changed("experiment/seed", 1), "x.yaml")
    assert experiment_digest(patient, extra) == digest
    assert experiment_digest(config, {"tokenizer": "t", "corpus": "c"}) == digest
    assert experiment_digest(other_seed, extra) != digest
    assert experiment_digest(config, {**extra, "corpus": "d"}) != digest


@pytest.mark.parametrize(
    ("key", "value", "difference"),
    [
        ("execution/lease_s", 99.0, None),
        ("name", "other", None),
        ("execution/audit_share", 0.1, None),
        ("experiment/topology/replicas", 2, "experiment.topology.replicas"),
        ("experiment/outer/rescale", "none", "experiment.outer.rescale"),
        ("experiment/inner/learning_rate", 1.0, "experiment.inner.learning_rate"),
        ("experiment/stages/2/phases", 13, "experiment.stages[2].phases"),
        ("experiment/baselines", [], "experiment.baselines"),
        ("experiment/corpus/source", {"kind": "files", "paths": ["a"]}, "experiment.corpus.source.kind"),
    ],
)
def test_resuming_names_the_key_that_may_not_change(key: str, value: Any, difference: str | None) -> None:
    assert resume_difference(load_config(QUICKSTART), parse_config(changed(key, value), "x.yaml")) == difference
