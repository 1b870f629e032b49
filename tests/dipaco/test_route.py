"""What `dipaco route` says of texts and traffic, on a small run before, while and after it trains."""

from __future__ import annotations

import asyncio
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from rich.console import Console

from configs.early_stopping import EarlyStoppingConfig
from configs.schema import Config
from coordinator.journal import RunUnusable
from coordinator.plan import MIXTURE
from coordinator.snapshot import RunSnapshot
from coordinator.state import Best, Version
from corpus.token_file import TokenFile
from corpus.tokenizer import Tokenizer
from dipaco.ending import Refused
from dipaco.evaluation import Evaluation, evaluate_run, tokenized
from dipaco.examples import Wish, continuations
from dipaco.route_table import text_view, traffic_view
from dipaco.routed_text import RoutedText, route_text
from dipaco.routed_traffic import route_traffic
from dipaco.run_router import open_router
from dipaco.training_sample import take_sample
from inference.sampling import Sampling
from model.store import BlobStore
from scripts.crash_points import small_config
from tests.played_run import played

WORDS = {
    "onion": "onion butter salt pan stir heat",
    "return": "return self value index range size",
    "licensee": "licensee party clause herein law",
}
TEXT = "stir the onion in butter and salt, then heat the pan: " + "butter salt pan " * 4


def config_of(folder: Path) -> Config:
    """Clusters, then a gater, over two paths and documents of three kinds."""
    document = small_config(folder, documents=96, reshard=True).model_dump(mode="json")
    document["execution"]["lease_s"] = 600.0
    return Config.model_validate(document)


def text_of(snapshot: RunSnapshot, text: str = TEXT, every: int | None = None, sample: int = 0) -> RoutedText:
    return route_text(snapshot, text, every=every, sample=sample)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, RoutedText]:
    """A finished run, what was said before its router was there, and a text that it routed while it trained."""
    folder = tmp_path_factory.mktemp("routed")
    said: list[str] = []
    routed: list[RoutedText] = []

    async def play() -> None:
        async with played(config_of(folder), folder / "run") as run:
            while not (lease := await run.lease()).finished:
                with RunSnapshot.held(run.run_dir) as snapshot:
                    if lease.task_id.startswith("pretrain/TRAIN"):
                        with pytest.raises(Refused) as refused:
                            text_of(snapshot)
                        said.append(str(refused.value))
                    elif lease.task_id.startswith("train/TRAIN"):
                        routed.append(text_of(snapshot, sample=50))
                await run.task(lease)

    asyncio.run(play())
    return folder / "run", said[0], routed[0]


@pytest.fixture(scope="module")
def snapshot(run: tuple[Path, str, RoutedText]) -> RunSnapshot:
    return RunSnapshot.open(run[0])


def traffic_file(folder: Path, kinds: list[str], documents: int = 60) -> Path:
    """Documents of some kinds, none of which the run has seen."""
    path = folder / "traffic.jsonl"
    lines = [
        json.dumps({"text": " ".join([WORDS[kinds[number % len(kinds)]]] * 6) + f" new {number}"})
        for number in range(documents)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def shown(view: Any) -> str:
    console = Console(width=200, file=io.StringIO())
    with console.capture() as captured:
        console.print(view)
    return captured.get()


# --- one text ---------------------------------------------------------------------------------------------------------


def test_before_the_router_is_there_that_is_said(run: tuple[Path, str, RoutedText]) -> None:
    assert run[1] == "this run has no router yet: its sharding is not done; let the run go on first"


def test_a_run_that_trains_routes_by_its_clusters_and_then_by_its_gater(
    run: tuple[Path, str, RoutedText], snapshot: RunSnapshot
) -> None:
    before, after = run[2], text_of(snapshot)
    assert (before.router["kind"], after.router["kind"]) == ("clusters", "gater")
    assert before.router["version"] != after.router["version"]
    assert snapshot.router_path is not None
    assert after.router["version"] == snapshot.router_path.name
    assert before.why is not None
    assert before.why.sampled == min(50, before.why.sequences)


def test_the_posterior_is_the_frozen_routers_on_the_features_of_the_prefix(snapshot: RunSnapshot) -> None:
    routed = text_of(snapshot)
    router = open_router(snapshot)
    tokenizer = Tokenizer.from_file(snapshot.tokenizer_path)
    prefix = np.array([tokenizer.bos_id, *tokenizer.encode(TEXT)[:8]])
    posterior = router.frozen.posterior(router.features([prefix]))[0]
    assert routed.posterior == {str(path): pytest.approx(share) for path, share in enumerate(posterior)}
    assert list(routed.posterior) == [routed.path, *(path for path in ("0", "1") if path != routed.path)]
    assert (routed.tokens, routed.prefix_tokens, routed.prefix) == (len(TEXT), 8, TEXT[:8])
    assert routed.warning is None


def test_generation_takes_the_path_that_is_shown(snapshot: RunSnapshot) -> None:
    prompts = [TEXT, "return self value index", "licensee party clause herein law"]
    written = continuations(snapshot, prompts, Wish(1, Sampling(0.0, None, seed=0)))
    assert [each.paths[0] for each in written] == [text_of(snapshot, prompt).path for prompt in prompts]


def test_a_text_below_the_prefix_is_routed_with_a_warning(snapshot: RunSnapshot) -> None:
    routed = text_of(snapshot, "stir", every=2)
    assert routed.prefix_tokens == routed.tokens == 4
    assert routed.warning is not None
    assert routed.warning.startswith("the text has 4 tokens, the router was made for 8")
    assert [(look.first, look.last, look.path) for look in routed.chunks] == [(1, 4, routed.path)]
    assert "warning: the text has 4 tokens" in shown(text_view(routed))


def test_looks_on_the_way_are_those_of_an_evaluation(snapshot: RunSnapshot, tmp_path: Path) -> None:
    every, texts = 5, [(TEXT * 2)[start : start + 63] for start in range(0, 60, 7)]
    data = tmp_path / "texts.jsonl"
    data.write_text("\n".join(json.dumps({"text": text + "."}) for text in texts), encoding="utf-8")
    text = tokenized(snapshot, data, BlobStore(tmp_path / "store"))
    evaluated = Evaluation(snapshot, text, [f"every:{every}"], lambda line: None)._routed()
    assert evaluated is not None
    paths = set()
    for row, line in enumerate(texts):
        looks = text_of(snapshot, line, every=every).chunks
        assert [look.path for look in looks] == [str(path) for path in evaluated.every[every][row]]
        assert (looks[0].first, looks[0].last, looks[1].first, looks[-1].last) == (1, 8 + every, 9 + every, 63)
        assert "".join(look.text for look in looks).replace(" ", "") == line.replace(" ", "")
        paths |= {look.path for look in looks}
    assert len(paths) > 1, "the test needs texts that change their path"


def test_the_reason_names_training_sequences_of_the_path(snapshot: RunSnapshot) -> None:
    path = text_of(snapshot).path
    (shard,) = [row for row in snapshot.state.shards_of(MIXTURE) if snapshot.topology.path_id(row.path_index) == path]
    with TokenFile.open(snapshot.store.path(shard.files[0].digest)) as file:
        tokenizer = Tokenizer.from_file(snapshot.tokenizer_path)
        texts = [tokenizer.decode(file.tokens(row)[1:].tolist()) for row in range(file.count)]
        domains = [file.domain_names[domain] for domain in file.domains]
    router = open_router(snapshot)
    of_the_path = next(row for row, text in enumerate(texts) if text_of(snapshot, text).path == path and len(text) > 8)
    why = text_of(snapshot, texts[of_the_path], sample=10_000).why
    assert why is not None
    assert why.sampled == why.sequences == shard.sequences == len(texts)
    assert why.domains == {name: domains.count(name) / len(domains) for name in why.domains}
    assert list(why.domains.values()) == sorted(why.domains.values(), reverse=True)
    assert why.nearest[0].distance == pytest.approx(0.0, abs=1e-6)
    assert why.as_far == 1.0
    for example in (*why.nearest, *why.typical):
        assert any(text.startswith(example.text.removesuffix("…")[:20].strip()) for text in map(str.strip, texts))
    assert [each.distance for each in why.nearest] == sorted(each.distance for each in why.nearest)
    z = router.features([np.array([tokenizer.bos_id, *tokenizer.encode(text)[:8]]) for text in texts])
    rows = router.frozen.transform(z)
    to_the_mean = np.sqrt(((rows - rows.mean(axis=0)) ** 2).sum(axis=1))
    assert why.typical[0].distance == pytest.approx(to_the_mean.min())


def test_a_text_that_is_like_nothing_is_far_from_everything(snapshot: RunSnapshot) -> None:
    strange = text_of(snapshot, "\x01\x02\x03\x04 \x05\x06\x07\x08 ÿÿÿÿ", sample=200).why
    usual = text_of(snapshot, " ".join([WORDS["onion"]] * 6), sample=200).why
    assert strange is not None
    assert usual is not None
    assert strange.usual_distance is not None
    assert strange.nearest[0].distance > 3 * strange.usual_distance
    assert (strange.as_far or 0.0) < (usual.as_far or 0.0)


def test_a_sample_is_bounded_seeded_and_from_all_files(snapshot: RunSnapshot) -> None:
    files = snapshot.token_files("train")
    router = open_router(snapshot)
    whole = take_sample(files * 2, router, 10_000, 1, lambda line: None)
    said: list[str] = []
    first, again, other = (take_sample(files * 2, router, 40, seed, said.append) for seed in (1, 1, 2))
    assert len(first) == 40
    assert np.array_equal(first.z, again.z)
    assert not np.array_equal(first.z, other.z)
    assert said[-1] == "features of 40 of 40 training sequences"
    sizes = [TokenFile.open(path).count for path in files]
    assert len(whole) == 2 * sum(sizes)
    assert np.array_equal(whole.z[: sum(sizes)], whole.z[sum(sizes) :])


def test_without_a_sample_no_reason_is_given(snapshot: RunSnapshot) -> None:
    routed = text_of(snapshot, sample=0)
    assert routed.why is None
    assert "why" not in shown(text_view(routed))
    assert "why path" in shown(text_view(text_of(snapshot, sample=10)))


def test_what_documents_hold_is_shown_as_it_is(snapshot: RunSnapshot) -> None:
    routed = text_of(snapshot, "[/bold] [red]" * 5, every=20, sample=10)
    assert routed.why is not None
    example = replace(routed.why.nearest[0], domain="[/a]", text="[/b] [bold]c")
    view = shown(text_view(replace(routed, why=replace(routed.why, nearest=(example,), domains={"[/d]": 1.0}))))
    for part in ("[/a]", "[/b] [bold]c", "[/d] 100.0 %", "'[/bold] '"):
        assert part in view


def test_a_text_without_tokens_is_refused(snapshot: RunSnapshot) -> None:
    with pytest.raises(Refused, match="the text is empty"):
        text_of(snapshot, "")


@pytest.mark.parametrize(
    ("kind", "modules", "sentence"),
    [
        ("random", 2, "no router: its shards are random, so no text belongs to one path rather than another"),
        ("all", 1, "this run has one path: there is nothing to route"),
    ],
)
def test_a_run_without_a_router_is_refused(snapshot: RunSnapshot, kind: str, modules: int, sentence: str) -> None:
    document = snapshot.config.model_dump(mode="json")
    experiment = document["experiment"]
    experiment["sharding"]["kind"] = kind
    experiment["topology"]["levels"][0]["modules"] = modules
    experiment["stages"] = [stage for stage in experiment["stages"] if stage["kind"] != "reshard"][:3]
    state = snapshot.state.copy()
    for stage in [state.stages["shard"], state.stages["reshard"]]:
        state.apply([replace(stage, result={**stage.result, "router": None})])
    with pytest.raises(Refused, match=sentence):
        text_of(RunSnapshot(snapshot.run_dir, Config.model_validate(document), state, []))


# --- many texts -------------------------------------------------------------------------------------------------------


def test_traffic_like_the_training_text_has_not_drifted(snapshot: RunSnapshot, tmp_path: Path) -> None:
    found = route_traffic(snapshot, traffic_file(tmp_path, list(WORDS)), oracle=False, sample=400)
    assert found["documents"] == 60
    assert found["drift"]["path_load"]["verdict"] == "no more than chance"
    assert found["drift"]["features"]["verdict"] == "no more than chance"
    assert found["oracle"] is None
    for loads in ("load", "training_load", "shard_sequences", "shard_tokens"):
        assert set(found[loads]) == {"0", "1"}
        assert sum(found[loads].values()) == pytest.approx(1.0)
    assert "no more than chance" in shown(traffic_view(found))


def test_traffic_of_one_kind_has_drifted(snapshot: RunSnapshot, tmp_path: Path) -> None:
    found = route_traffic(snapshot, traffic_file(tmp_path, ["return"]), oracle=False, sample=400)
    load, features = found["drift"]["path_load"], found["drift"]["features"]
    assert load["verdict"] in ("moderate", "large")
    assert load["psi"] > load["psi_by_chance"]
    assert features["psi_highest"] > features["psi_by_chance"]
    assert features["rms_shift"] > features["rms_shift_by_chance"]
    assert features["largest"][0]["psi"] == features["psi_highest"]


def test_loads_and_confidence_are_those_of_the_frozen_router(snapshot: RunSnapshot, tmp_path: Path) -> None:
    data = traffic_file(tmp_path, list(WORDS), documents=20)
    found = route_traffic(snapshot, data, oracle=False, sample=10_000)
    router = open_router(snapshot)
    text = tokenized(snapshot, data, BlobStore(tmp_path / "store"))
    sequences = []
    for file in text.files:
        with TokenFile.open(text.store.path(file.digest)) as opened:
            sequences += [np.array(opened.tokens(row)) for row in range(opened.count)]
    posterior = router.frozen.posterior(router.features([tokens[:9] for tokens in sequences]))
    share = float((posterior.argmax(axis=1) == 0).mean())
    assert (found["sequences"], found["load"]["0"]) == (len(sequences), pytest.approx(share))
    assert found["tokens"] == sum(len(tokens) - 1 for tokens in sequences)
    assert found["short_sequences"] == sum(len(tokens) < 9 for tokens in sequences)
    assert found["confidence"]["mean"] == pytest.approx(posterior.max(axis=1).mean(), rel=1e-6)
    assert found["confidence"]["quantiles"]["0.5"] == pytest.approx(np.median(posterior.max(axis=1)), rel=1e-6)


def test_shards_have_the_shares_of_their_manifests(snapshot: RunSnapshot, tmp_path: Path) -> None:
    found = route_traffic(snapshot, traffic_file(tmp_path, ["onion"], 4), oracle=False, sample=0)
    entries = snapshot.state.stages["reshard"].result["shards"]
    total = sum(entry["sequences"] for entry in entries)
    assert found["shard_sequences"] == {
        str(path): pytest.approx(entry["sequences"] / total) for path, entry in enumerate(entries)
    }
    assert found["training_load"] is None
    assert found["drift"]["path_load"] is None
    assert found["drift"]["features"] is None
    assert "drift of path loads" not in shown(traffic_view(found))


def test_the_oracles_losses_are_those_of_an_evaluation(snapshot: RunSnapshot, tmp_path: Path) -> None:
    data = traffic_file(tmp_path, list(WORDS), documents=30)
    found = route_traffic(snapshot, data, oracle=True, sample=0)["oracle"]
    routes = ["sequence", "oracle:sequence", "path:0", "path:1"]
    evaluated = evaluate_run(snapshot, data=data, routes=routes)
    perplexity = evaluated["perplexity"]["dipaco"]
    assert found["tokens"] == evaluated["tokens"]["evaluated"]
    assert math.exp(found["router_loss"]) == pytest.approx(perplexity["sequence"])
    assert math.exp(found["oracle_loss"]) == pytest.approx(perplexity["oracle:sequence"])
    assert math.exp(found["best_path_loss"]) == pytest.approx(min(perplexity["path:0"], perplexity["path:1"]))
    assert found["oracle_loss"] <= found["router_loss"]
    assert 0.0 <= found["agreement"] <= 1.0
    assert sum(found["oracle_load"].values()) == pytest.approx(1.0)


def test_the_oracle_compares_the_version_that_is_asked_for(snapshot: RunSnapshot, tmp_path: Path) -> None:
    """Each path's best modules are the other's last: what is best under one is best under the other."""
    experiment = snapshot.config.experiment.model_copy(update={"early_stopping": EarlyStoppingConfig()})
    state = snapshot.state.copy()
    first, second = (tuple(path.modules) for path in snapshot.paths())
    state.apply([Best(0, 1, second, 1.0, 1), Best(1, 1, first, 1.0, 1)])
    config = snapshot.config.model_copy(update={"experiment": experiment})
    swapped = RunSnapshot(snapshot.run_dir, config, state, [])
    data = traffic_file(tmp_path, list(WORDS), documents=30)
    last, best = (
        route_traffic(swapped, data, oracle=True, sample=0, version=version)["oracle"] for version in get_args(Version)
    )
    assert last["oracle_load"] == route_traffic(snapshot, data, oracle=True, sample=0)["oracle"]["oracle_load"]
    assert best["oracle_load"] == {"0": last["oracle_load"]["1"], "1": last["oracle_load"]["0"]}
    assert best["agreement"] == pytest.approx(1 - last["agreement"])


def test_best_paths_of_a_run_that_keeps_none_are_refused(snapshot: RunSnapshot, tmp_path: Path) -> None:
    with pytest.raises(RunUnusable, match="keeps no best versions"):
        route_traffic(snapshot, traffic_file(tmp_path, ["onion"], 4), oracle=True, sample=0, version="best")


def test_an_oracle_without_a_sequence_to_measure_is_refused(snapshot: RunSnapshot, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short", encoding="utf-8")
    with pytest.raises(Refused, match="has the 64 tokens that --oracle needs"):
        route_traffic(snapshot, tmp_path / "short.txt", oracle=True, sample=0)
    assert route_traffic(snapshot, tmp_path / "short.txt", oracle=False, sample=20)["sequences"] == 1


def test_the_answers_are_json(snapshot: RunSnapshot, tmp_path: Path) -> None:
    found = route_traffic(snapshot, traffic_file(tmp_path, ["onion"], 4), oracle=True, sample=30)
    assert json.loads(json.dumps(found)) == found
    routed = text_of(snapshot, every=4, sample=30).as_dict()
    assert json.loads(json.dumps(routed))["why"]["sampled"] == 30
