"""A run that trains a router LM, from its YAML: what it learns, what a crash may do, and what it is asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.load import parse_config, to_yaml
from configs.routes import UnknownRoute
from configs.schema import Config
from coordinator.snapshot import RunSnapshot
from coordinator.virtual import Costs, VirtualRun
from corpus.token_file import TokenFile
from dipaco.ending import Refused
from dipaco.evaluation import evaluate_run
from dipaco.examples import Wish, continuations
from dipaco.report import build_report
from dipaco.report_page import page
from dipaco.run_router import open_router_lm
from dipaco.table import accuracy_line
from inference.sampling import Sampling
from model.path import load_path
from protocol.tasks import EvaluateSpec, TrainSpec
from routing.records import Losses
from routing.router import RouteState
from routing.targets import NO_TARGET
from tests.played_run import Played, config_of, digest, played

PREFIX, WINDOW = 8, 12
ROUTES = ["sequence", "router:8", "router:16", "oracle:every:8"]


def configured(folder: Path, *, router: bool = True, sharding: str = "kmeans") -> Config:
    """The small run with a router LM and an evaluation of it, read from YAML."""
    document: Any = config_of(folder).model_dump(mode="json")
    experiment = document["experiment"]
    experiment["corpus"]["splits"] |= {"router": 0.3, "test": 0.2}
    experiment["sharding"]["kind"] = sharding
    stage = {"kind": "router", "steps": 4, "inner_steps": 2, "window": WINDOW}
    experiment["stages"] += [*([stage] if router else []), {"kind": "evaluate"}]
    experiment["evaluation"] = {"routes": ROUTES if router else ["oracle:every:8"]}
    return parse_config(to_yaml(Config.model_validate(document)), "run.yaml")


def play(config: Config, folder: Path, script: Callable[[Played], Awaitable[None]]) -> Path:
    """Open the run in `folder` (again), let the script call it, close it; returns its directory."""

    async def opened() -> None:
        async with played(config, folder / "run") as run:
            await script(run)

    asyncio.run(opened())
    return folder / "run"


@pytest.fixture(scope="module")
def scored() -> dict[str, np.ndarray]:
    """Losses of single tokens by the subject of a SCORE task, as the workers of `routed` have handed them in."""
    return {}


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory, scored: dict[str, np.ndarray]) -> Path:
    folder = tmp_path_factory.mktemp("routed")

    async def finish(run: Played) -> None:
        while not (lease := await run.lease()).finished:
            outcome = run.compute(lease)
            if "/SCORE/" in lease.task_id:
                assert isinstance(lease.spec, EvaluateSpec)
                assert lease.spec.chunk_tokens == 1
                scored[lease.task_id.rpartition("/")[2]] = Losses.from_bytes(outcome.files["losses"].read_bytes()).loss
            await run.upload(lease, outcome)
            await run.complete(lease, outcome)

    return play(configured(folder), folder, finish)


def test_the_targets_are_the_best_paths_of_what_was_scored(routed: Path, scored: dict[str, np.ndarray]) -> None:
    snapshot = RunSnapshot.open(routed)
    found = snapshot.state.stages["targets"].result
    losses = np.stack([scored[subject] for subject in sorted(scored)])  # (P, N, C): one token file, two paths
    assert losses.shape[0] == 2
    counts = np.zeros(2)
    with (
        TokenFile.open(snapshot.store.path(found["targets"][0])) as targets,
        TokenFile.open(snapshot.store.path(found["file"][0])) as tokens,
    ):
        assert targets.ids.tolist() == tokens.ids.tolist()
        assert targets.lengths.tolist() == tokens.lengths.tolist()
        assert targets.count == losses.shape[1] == found["sequences"] > 0
        for n in range(targets.count):
            row, length = targets.tokens(n), int(tokens.lengths[n])
            for place in range(length):
                if PREFIX <= place < length - 1:
                    ahead = losses[:, n, place - PREFIX : place - PREFIX + WINDOW].sum(axis=1)
                    assert ahead[row[place]] == pytest.approx(ahead.min(), abs=1e-9)
                    counts[row[place]] += 1
                else:
                    assert row[place] == NO_TARGET
    assert found["labelled_tokens"] == counts.sum()
    assert found["target_shares"] == pytest.approx((counts / counts.sum()).tolist())


def test_it_is_trained_like_any_path_by_a_counter_of_its_own(routed: Path) -> None:
    snapshot = RunSnapshot.open(routed)
    trained = [metric for metric in snapshot.metrics if metric["model"] == "router" and metric["kind"] == "TRAIN"]
    assert [(m["stage"], m["phase"], m["first_step"], m["steps"]) for m in trained] == [
        ("router", 0, 0, 2),
        ("router", 1, 2, 2),
    ]
    base = {row.module_id: row.params for row in snapshot.state.modules_of("base")}
    modules = snapshot.state.modules_of("router")
    assert [(row.module_id, row.version) for row in modules] == [("0.0", 2), ("1.0", 2)]
    assert all(row.params != base[row.module_id] for row in modules)
    [shard] = snapshot.state.shards_of("router")
    assert (shard.phase, shard.steps_done, shard.adam_step) == (2, 4, 4)
    stages = {stage["name"]: (stage["done"], stage["total"]) for stage in snapshot.status()["stages"]}
    assert stages["router"] == (4, 4)
    assert stages["train"] == (8, 8)


def test_the_report_has_its_routes_and_how_often_they_are_right(routed: Path) -> None:
    snapshot = RunSnapshot.open(routed)
    report = build_report(snapshot)
    assert list(report["perplexity"]["dipaco"]) == ROUTES
    assert sorted(report["route_accuracy"]) == ["router:16", "router:8", "sequence"]
    assert all(0 <= share <= 1 for share in report["route_accuracy"].values())
    assert accuracy_line(report) in page(report, None)
    assert report["perplexity"]["dipaco"]["router:8"] >= report["perplexity"]["dipaco"]["oracle:every:8"]
    again = evaluate_run(snapshot)
    for key in ("perplexity", "route_accuracy", "path_load"):
        assert again[key] == report[key]
    other = evaluate_run(snapshot, routes=["router:4"])
    assert list(other["perplexity"]["dipaco"]) == ["router:4"]


def test_it_is_asked_as_it_was_trained_whatever_the_length_of_the_text(routed: Path) -> None:
    """Against a plain forward pass; of a text longer than 64 tokens it reads BOS and the newest 63."""
    snapshot = RunSnapshot.open(routed)
    files = {module_id: path for module_id, (_, path) in snapshot.modules("router").items()}
    model = load_path(snapshot.config.experiment.model, snapshot.vocab_size, snapshot.plan.dense, files)
    router = open_router_lm(snapshot)
    text = np.random.default_rng(0).integers(2, 258, 90)
    for length in (1, 9, 64, 65, 90):
        posterior, state = router.route(text[:length])
        read = text[:length] if length <= 64 else np.append(text[:1], text[length - 63 : length])
        with torch.no_grad():
            scores = model.logits(model(torch.from_numpy(read)[None]))[0, -1, :2].double()
        np.testing.assert_allclose(posterior, scores.softmax(dim=0).numpy(), atol=1e-6)
        assert state.seen_tokens == length - 1
    assert (router.num_paths, router.version) == (2, " ".join(files[module_id].name for module_id in sorted(files)))


class Alternating:
    """A router LM that goes from path to path with every four tokens that it is shown."""

    num_paths, version = 2, "alternating"

    def route(self, tokens: np.ndarray, state: RouteState | None = None) -> tuple[np.ndarray, RouteState]:
        return np.eye(2)[len(tokens) // 4 % 2], RouteState(len(tokens) - 1)


def test_text_is_generated_by_the_paths_that_it_chooses(routed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dipaco.examples.open_router_lm", lambda snapshot: Alternating())
    snapshot = RunSnapshot.open(routed)
    [found] = continuations(snapshot, ["onion pan"], Wish(12, Sampling(temperature=0.0)).routed("router:4"))
    # After nine tokens it is shown the prefix of 8, then 12, 16 and, for the last token, 20; each with BOS.
    assert (found.paths, found.tokens) == (("0", "1", "0", "1"), 12)


def test_a_route_of_a_generation_is_one_that_can_be_followed() -> None:
    wish = Wish(4, Sampling())
    assert (wish.routed("every:8").every, wish.routed("every:8").by_router_lm) == (8, False)
    assert (wish.routed("sequence").every, wish.routed("router:16").every) == (None, 16)
    with pytest.raises(Refused, match=r"'oracle:every:8' is for measuring; .* sequence, every:W, router:W, "):
        wish.routed("oracle:every:8")
    with pytest.raises(UnknownRoute, match="is none of"):
        wish.routed("best")
    for other in (Wish(4, Sampling(), every=8), Wish(4, Sampling(), path="0")):
        with pytest.raises(Refused, match="leave --every and --path out"):
            other.routed("router:16")


def test_nothing_that_nobody_names_is_left(routed: Path) -> None:
    snapshot = RunSnapshot.open(routed)
    held = {path.name for path in (routed / "blobs").iterdir() if len(path.name) == 64}
    assert held == set(snapshot.blobs())
    assert not list((routed / "blobs" / "scratch").iterdir())


def test_a_restart_at_any_task_changes_nothing(routed: Path, tmp_path: Path) -> None:
    config, seen = configured(tmp_path), list[tuple[str, Any]]()

    async def one_task(run: Played) -> None:
        lease = await run.lease()
        if not lease.finished:
            seen.append((lease.task_id, lease.spec))
            await run.task(lease)

    while True:
        run_dir = play(config, tmp_path, one_task)
        if RunSnapshot.open(run_dir).state.standing.finished:
            break
    assert digest(run_dir) == digest(routed)
    specs = [spec for task_id, spec in seen if task_id.startswith("router/TRAIN/")]
    assert len(specs) == 2
    assert all(isinstance(spec, TrainSpec) and (spec.objective, spec.total_steps) == ("router", 4) for spec in specs)
    assert all(
        spec.objective == "lm" and not spec.targets
        for task_id, spec in seen
        if isinstance(spec, TrainSpec) and not task_id.startswith("router/")
    )


def test_a_run_without_a_router_of_features_may_have_one(tmp_path: Path) -> None:
    config = configured(tmp_path, sharding="random")
    snapshot = RunSnapshot.open(play(config, tmp_path, Played.finish))
    assert snapshot.evaluation is not None
    assert list(snapshot.evaluation["perplexity"]["dipaco"]) == ["router:8", "router:16", "oracle:every:8"]


def test_the_route_is_refused_where_the_run_has_no_router_lm(tmp_path: Path) -> None:
    without = play(configured(tmp_path, router=False), tmp_path, Played.finish)
    with pytest.raises(Refused, match=r"router:W need a trained router LM, .* its stages have no router"):
        evaluate_run(RunSnapshot.open(without), routes=["router:8"])


def test_the_route_is_refused_before_the_router_lm_is_trained(tmp_path: Path) -> None:
    async def until_it_is_trained(run: Played) -> None:
        while not (await run.task()).task_id.startswith("router/TRAIN/0"):
            pass

    snapshot = RunSnapshot.open(play(configured(tmp_path), tmp_path, until_it_is_trained))
    with pytest.raises(Refused, match=r"router:W need a trained router LM, .* let the run go on first"):
        evaluate_run(snapshot)


def test_a_vocabulary_that_cannot_name_all_paths_pauses_the_run_at_its_start(tmp_path: Path) -> None:
    document: Any = configured(tmp_path).model_dump(mode="json")
    document["experiment"]["topology"]["levels"][0]["modules"] = 259  # bytes make 258 tokens
    config = Config.model_validate(document)

    async def wait(run: Played) -> None:
        await run.until(lambda: run.coordinator.paused)
        assert (
            "scores 259 paths by as many tokens of the vocabulary, and the tokenizer has 258" in run.coordinator.paused
        )

    play(config, tmp_path, wait)


def test_a_virtual_run_counts_its_steps(tmp_path: Path) -> None:
    costs = Costs(step_s=1.0, other_task_s=5.0, overhead_s=2.0, outer_step_s=1.0, start_s=0.0)
    run = VirtualRun(configured(tmp_path), costs, [(0.0, f"worker-{index}", "start") for index in range(2)])
    outcome = run.run()
    assert outcome.finished
    assert outcome.steps_in_weights == outcome.steps_executed == 2 + 2 * 2 * 2 + 4
    stages = run.machine.state.stages
    assert stages["router"].started_s >= stages["targets"].finished_s > stages["train"].finished_s
