"""Best versions from a configuration to the report: what was measured, what is used, what it costs, what stays."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from configs.load import parse_config, to_yaml
from configs.schema import Config
from coordinator.journal import RunUnusable
from coordinator.plan import MIXTURE, blob
from coordinator.snapshot import RunSnapshot
from coordinator.state import Best, Module, State
from corpus.token_file import TokenFile
from dipaco.commands.evaluate import evaluate
from dipaco.early_stopping import early_stopping_line, early_stopping_of, version_named
from dipaco.ending import Refused
from dipaco.evaluation import Evaluation, Text, evaluate_run
from dipaco.examples import Wish, _paths, continuations
from dipaco.report import build_report
from dipaco.report_page import page
from dipaco.run_digest import run_digest
from dipaco.table import report_table
from inference.sampling import Sampling
from protocol.tasks import BlobRef, EvaluateSpec, ModuleRef
from routing.records import evaluated_positions
from scripts.crash_points import small_config
from tests.played_run import Played, digest, played
from worker.outcome import no_progress
from worker.task import inputs, run_task


def config_of(folder: Path, **changes: Any) -> Config:
    """A run that is re-sharded half-way, from YAML; its outer steps are too long, so that later versions are worse."""
    document = small_config(folder, documents=60, reshard=True).model_dump(mode="json")
    experiment = document["experiment"]
    pretrain = experiment["stages"][0]
    trains = [{"kind": "train", "phases": phases, "inner_steps": 2} for phases in (1, 3)]
    experiment["stages"] = [
        pretrain,
        {"kind": "shard"},
        trains[0],
        {"kind": "reshard"},
        trains[1],
        {"kind": "evaluate"},
    ]
    experiment["corpus"]["splits"] = {"router": 0.2, "stop": 0.25, "validation": 0.0, "test": 0.15}
    experiment["corpus"]["range_characters"] = 2000
    experiment |= {"outer": {"kind": "nesterov", "learning_rate": 4.0}, "early_stopping": changes}
    experiment["evaluation"] = {"routes": ["sequence", "every:32", "oracle:sequence"]}
    document["execution"] |= {"lease_s": 600.0}
    return parse_config(to_yaml(Config.model_validate(document)), "run.yaml")


def play(folder: Path, script: Callable[[Played], Awaitable[None]], **changes: Any) -> tuple[Path, list[str]]:
    """Open the run in `folder` (again), let the script call it, close it; its directory, and what it said."""

    async def opened() -> list[str]:
        async with played(config_of(folder, **changes), folder / "run") as run:
            await script(run)
            return run.said

    return folder / "run", asyncio.run(opened())


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return play(tmp_path_factory.mktemp("stopped"), Played.finish)[0]


@pytest.fixture
def snapshot(stopped: Path) -> RunSnapshot:
    return RunSnapshot.open(stopped)


def measured(snapshot: RunSnapshot, stage: str) -> dict[tuple[int, int], float]:
    """Mean loss by path and phase, from what was counted."""
    sums: dict[tuple[int, int], list[float]] = {}
    for metric in snapshot.metrics:
        if metric["kind"] == "STOP" and metric["stage"] == stage:
            found = sums.setdefault((int(metric["task_id"].split("/")[-1].split("-")[0]), metric["phase"]), [0.0, 0.0])
            found[0] += metric["loss_sum"]
            found[1] += metric["tokens"]
    return {key: loss / tokens for key, (loss, tokens) in sums.items()}


def test_best_is_the_phase_of_lowest_loss_since_the_re_shard(snapshot: RunSnapshot) -> None:
    losses = measured(snapshot, "train-2")
    assert {phase for _, phase in losses} == {1, 2, 3}
    assert {phase for _, phase in measured(snapshot, "train")} == {0}
    for path in (0, 1):
        of_path = {phase: loss for (each, phase), loss in losses.items() if each == path}
        row = snapshot.state.best[str(path)]
        assert row.phase == min(of_path, key=lambda phase: of_path[phase])
        assert row.loss_sum / row.tokens == pytest.approx(min(of_path.values()), rel=1e-12)
        assert row.phase < 3, "with outer steps this long the last version is not the best"


def test_what_is_kept_has_the_loss_that_was_measured(snapshot: RunSnapshot, tmp_path: Path) -> None:
    selections = snapshot.state.stages["reshard"].result["stop"]
    assert len({part["index"] for part in snapshot.plan.ranges(snapshot.state, "stop")}) > 1
    for path in snapshot.paths(version="best"):
        total = 0.0
        for part in snapshot.plan.ranges(snapshot.state, "stop"):
            if (selection := selections.get(f"{path.path_index}-{part['index']}")) is not None:
                spec = EvaluateSpec(
                    path=path,
                    tokens=blob(part["file"]),
                    prefix_tokens=8,
                    chunk_tokens=32,
                    numerics=snapshot.plan.numerics,
                    selection=blob(selection),
                )
                files = {ref.digest: snapshot.store.path(ref.digest) for refs in inputs(spec).values() for ref in refs}
                outcome = run_task(spec, snapshot.config.experiment, files, tmp_path, no_progress)
                total += outcome.result.loss_sum
        assert total == pytest.approx(snapshot.state.best[str(path.path_index)].loss_sum, rel=1e-9)


def test_each_stop_sequence_is_measured_under_the_path_that_it_is_routed_to(snapshot: RunSnapshot) -> None:
    parts = snapshot.plan.ranges(snapshot.state, "stop")
    text = Text(tuple(blob(part["file"]) for part in parts), snapshot.store, None)
    routes = Evaluation(snapshot, text, ["sequence"], lambda line: None)._routed()
    assert routes is not None
    selections = snapshot.state.stages["reshard"].result["stop"]
    chosen: list[int] = []
    for part in parts:
        with TokenFile.open(snapshot.store.path(blob(part["file"]).digest)) as file:
            owner = np.full(file.count, -1)
            evaluated = evaluated_positions(file, None)
        for path in (0, 1):
            if (pair := selections.get(f"{path}-{part['index']}")) is not None:
                positions = np.frombuffer(snapshot.store.path(blob(pair).digest).read_bytes(), "<u4")
                assert (owner[positions] == -1).all()
                owner[positions] = path
        chosen += owner[evaluated].tolist()
        assert np.count_nonzero(owner >= 0) == len(evaluated), "shorter sequences are left out"
    assert chosen == routes.sequence.tolist()


def test_both_versions_are_reported_and_measured_again(
    snapshot: RunSnapshot, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = build_report(snapshot)
    perplexity = report["perplexity"]
    assert list(perplexity) == ["dipaco", "dipaco-best"]
    assert perplexity["dipaco-best"]["sequence"] < perplexity["dipaco"]["sequence"]
    assert set(perplexity["dipaco-best"]) == {"sequence", "every:32", "oracle:sequence"}
    assert all(set(models) == {"dipaco", "dipaco-best"} for models in report["per_domain"].values())
    again = evaluate_run(snapshot)
    for key in ("perplexity", "bits_per_byte", "per_domain", "path_load"):
        assert again[key] == report[key]
    for version, name in (("last", "dipaco"), ("best", "dipaco-best")):
        evaluate(stopped, version=version, as_json=True)
        assert json.loads(capsys.readouterr().out)["perplexity"] == {name: perplexity[name]}
    fixed = evaluate_run(snapshot, routes=["path:0"])["perplexity"]
    assert fixed["dipaco-best"]["path:0"] < fixed["dipaco"]["path:0"]


def test_the_report_says_what_best_costs(snapshot: RunSnapshot) -> None:
    report = build_report(snapshot)
    found = report["early_stopping"]
    row = snapshot.state.best["0"]
    assert found["paths"]["0"] == {
        "version": row.phase + 1,
        "stop_loss": row.loss_sum / row.tokens,
        "tokens": row.tokens,
    }
    assert found["kept_bytes"] > 0
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report_table(report))
    shown = console.export_text()
    assert "dipaco-best sequence" in shown
    assert early_stopping_line(found) in shown
    html = page(report, None)
    assert "Best version by path" in html
    assert f"<td>{row.phase + 1}</td>" in html


def test_the_paths_of_best_are_those_that_generate(snapshot: RunSnapshot) -> None:
    best = [tuple(module.blob.digest for module in path.modules) for path in snapshot.paths(version="best")]
    last = [tuple(module.blob.digest for module in path.modules) for path in snapshot.paths()]
    assert all(one != other for one, other in zip(best, last, strict=True))
    assert [_paths(snapshot, MIXTURE, "best").modules(path)[0] for path in (0, 1)] == best
    assert [_paths(snapshot, MIXTURE, "last").modules(path)[0] for path in (0, 1)] == last
    [written] = continuations(snapshot, ["onion butter"], Wish(4, Sampling(), version="best"))
    assert written.tokens


def test_a_run_without_best_versions_refuses_them(snapshot: RunSnapshot) -> None:
    experiment = snapshot.config.experiment.model_copy(update={"early_stopping": None})
    config = snapshot.config.model_copy(update={"experiment": experiment})
    without = RunSnapshot(snapshot.run_dir, config, snapshot.state, snapshot.metrics)
    with pytest.raises(RunUnusable, match=r"keeps no best versions: its experiment\.early_stopping is not set"):
        evaluate_run(without, versions=["best"])
    with pytest.raises(Refused, match="version 'newest' is none of last, best"):
        version_named("newest")


def test_nothing_that_nobody_names_is_left(stopped: Path, snapshot: RunSnapshot) -> None:
    held = {path.name for path in (stopped / "blobs").iterdir() if len(path.name) == 64}
    assert held == set(snapshot.blobs())


def test_a_restart_at_any_task_changes_nothing(stopped: Path, snapshot: RunSnapshot, tmp_path: Path) -> None:
    kinds: set[str] = set()

    async def one_task(run: Played) -> None:
        lease = await run.lease()
        if not lease.finished:
            kinds.add(lease.task_id.split("/")[1])
            await run.task(lease)

    while not RunSnapshot.open(play(tmp_path, one_task)[0]).state.standing.finished:
        pass
    assert digest(tmp_path / "run") == digest(stopped)
    assert "STOP" in kinds
    snapshot.state.best["0"] = replace(snapshot.state.best["0"], loss_sum=1.0)
    assert run_digest(snapshot, everything=True) != digest(stopped), "best versions are a part of it"


def test_a_path_without_stop_sequences_is_named(tmp_path: Path) -> None:
    async def until_trained(run: Played) -> None:
        while not (lease := await run.lease()).task_id.startswith("train/"):
            await run.task(lease)

    config = config_of(tmp_path, max_sequences=1)
    assert config.experiment.early_stopping is not None
    run_dir, said = play(tmp_path, until_trained, max_sequences=1)
    selections = RunSnapshot.open(run_dir).state.stages["shard"].result["stop"]
    unmeasured = {"0", "1"} - {subject.partition("-")[0] for subject in selections}
    told = [line for line in said if "no sequence of the stop split" in line]
    assert [
        f"shard: no sequence of the stop split is routed to {path}: its best version is its last" for path in unmeasured
    ] == told


def test_lost_sharing_and_kept_bytes_are_counted(snapshot: RunSnapshot) -> None:
    """Two paths that share module 1.0: one is best at version 1, the other at 2, the newest is 3, which keeps 2."""

    def ref(name: str, version: int) -> ModuleRef:
        digest = f"{version}{name.replace('.', '')}".ljust(64, "a")
        return ModuleRef(module_id=name, version=version, blob=BlobRef(digest=digest, size=10**version))

    def module(name: str) -> Module:
        return Module(MIXTURE, name, 3, ref(name, 3).blob, history=(ref(name, 2).blob,))

    best = [Best(0, 0, (ref("0.0", 1), ref("1.0", 1)), 30.0, 10), Best(1, 1, (ref("0.1", 2), ref("1.0", 2)), 20.0, 10)]
    state = State([*best, *(module(name) for name in ("0.0", "0.1", "1.0"))])
    found = early_stopping_of(RunSnapshot(snapshot.run_dir, snapshot.config, state, []))
    assert found == {
        "paths": {
            "0": {"version": 1, "stop_loss": 3.0, "tokens": 10},
            "1": {"version": 2, "stop_loss": 2.0, "tokens": 10},
        },
        "kept_bytes": 20,
        "versions_per_module": pytest.approx(4 / 3),
    }
    assert "best versions 1 to 2 of 2 paths: 0.0 MB" in early_stopping_line(found)
    state.apply([Best(0), Best(1)])
    assert early_stopping_of(RunSnapshot(snapshot.run_dir, snapshot.config, state, [])) == {}
