"""`dipaco cloze` on the tiny run: its numbers are those of the paths themselves, and routes see no ending."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from configs.early_stopping import EarlyStoppingConfig
from configs.routes import UnknownRoute
from coordinator.journal import RunUnusable
from coordinator.snapshot import RunSnapshot
from coordinator.state import Best
from corpus.token_file import TokenFile
from dipaco.cloze import Cloze, cloze_run, default_routes, measured_models
from dipaco.cloze_items import ClozeForm, ClozeItems, cloze_items
from dipaco.cloze_score import KEYS
from dipaco.cloze_table import cloze_table
from dipaco.ending import Refused
from dipaco.local_tasks import LocalTasks
from dipaco.run_router import open_router
from model.path import load_path
from protocol.tasks import EvaluateSpec
from tests.command_line import dipaco
from worker.outcome import Progress

FORM = ClozeForm(items=40, context_tokens=32, ending_tokens=8)
PATHS = ["path:0.0", "path:0.1", "path:1.0", "path:1.1"]
CAUSAL = ["sequence", "every:16", "likelihood:16", "ensemble:2", "oracle:sequence"]


@pytest.fixture(scope="module")
def snapshot(tiny_run: tuple[Path, Any]) -> Iterator[RunSnapshot]:
    with RunSnapshot.held(tiny_run[0] / "runs" / "tiny") as snapshot:
        yield snapshot


def items_of(snapshot: RunSnapshot) -> ClozeItems:
    with ExitStack() as stack:
        return cloze_items([stack.enter_context(TokenFile.open(path)) for path in snapshot.token_files("test")], FORM)


@pytest.fixture(scope="module")
def found(snapshot: RunSnapshot) -> dict[str, Any]:
    return cloze_run(snapshot, FORM, split="test", routes=[*CAUSAL, *PATHS])


def reference(snapshot: RunSnapshot, items: ClozeItems, path_index: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihoods (n, 4) of endings behind their contexts and behind BOS: one sequence at a time."""
    modules = snapshot.paths()[path_index].modules
    files = {module.module_id: snapshot.store.path(module.blob.digest) for module in modules}
    path = load_path(snapshot.config.experiment.model, snapshot.vocab_size, snapshot.topology, files)
    behind, alone = np.zeros((2, len(items), 4))
    for item, choice in np.ndindex(behind.shape):
        ending = items.endings[item, choice].astype(np.int64)
        for out, before in ((behind, items.contexts[item]), (alone, items.contexts[item, :1])):
            tokens = torch.from_numpy(np.concatenate([before.astype(np.int64), ending]))[None]
            with torch.no_grad():
                logits = path.logits(path(tokens))[0, len(before) - 1 : -1].double()
            out[item, choice] = -F.cross_entropy(logits, tokens[0, len(before) :], reduction="sum")
    return behind, alone


def test_accuracies_are_those_of_the_paths_themselves(snapshot: RunSnapshot, found: dict[str, Any]) -> None:
    items = items_of(snapshot)
    assert (found["items"], found["items_digest"]) == (len(items), items.digest)
    for path_index in (0, 3):
        behind, alone = reference(snapshot, items, path_index)
        name = f"path:{snapshot.topology.path_id(path_index)}"
        for key, values in (("accuracy", behind), ("gain_accuracy", behind - alone)):
            right = values[:, 0] > values[:, 1:].max(axis=1)
            assert found[key]["dipaco"][name] == pytest.approx(right.mean()), (name, key)


def test_a_sequence_takes_the_path_that_the_router_gives_its_prefix(
    snapshot: RunSnapshot, found: dict[str, Any]
) -> None:
    items, router = items_of(snapshot), open_router(snapshot)
    prefix_tokens = snapshot.config.experiment.sharding.prefix_tokens
    choice = router.frozen.paths(router.features(list(items.contexts[:, : prefix_tokens + 1])))
    right = np.zeros(len(items))
    for path_index in np.unique(choice):
        behind, _ = reference(snapshot, items, int(path_index))
        mine = choice == path_index
        right[mine] = (behind[:, 0] > behind[:, 1:].max(axis=1))[mine]
    assert len(np.unique(choice)) > 1
    assert found["accuracy"]["dipaco"]["sequence"] == pytest.approx(right.mean())


def test_every_model_is_asked_overall_and_by_domain(snapshot: RunSnapshot, found: dict[str, Any]) -> None:
    assert measured_models(snapshot) == ["base", "mixture", "dense", "dense-nesterov"]
    for part in (found, *found["per_domain"].values()):
        for key in KEYS:
            assert part[key].keys() == {"base", "dense", "dense-nesterov", "dipaco"}
            assert part[key]["dipaco"].keys() == {*CAUSAL, *PATHS}
    for key in ("accuracy", "gain_accuracy"):
        parts = [(each["items"], each[key]["dense"]) for each in found["per_domain"].values()]
        assert sum(count * share for count, share in parts) / found["items"] == pytest.approx(found[key]["dense"])
    assert sum(each["items"] for each in found["per_domain"].values()) == found["items"]


class Choices:
    """The token files and losses of a cloze, and what was needed of whom."""

    def __init__(self, snapshot: RunSnapshot, items: ClozeItems, monkeypatch: pytest.MonkeyPatch) -> None:
        self.needed: list[np.ndarray] = []

        def note(losses: Any, paths: Any, needed: np.ndarray, *, alone: bool) -> np.ndarray:
            del losses, alone
            self.needed.append(needed)
            return np.zeros((len(items), 4, len(paths)))

        monkeypatch.setattr("dipaco.cloze.ItemLosses.endings", note)
        for route in CAUSAL:
            Cloze(snapshot, items, FORM, [route]).run(["last"], lambda line: None)


def test_no_route_depends_on_an_ending(snapshot: RunSnapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    items = items_of(snapshot)
    others = replace(items, endings=np.full_like(items.endings, 7))
    one, two = (Choices(snapshot, each, monkeypatch).needed for each in (items, others))
    assert len(one) == len(two) > 0
    assert all(np.array_equal(first, second) for first, second in zip(one, two, strict=True))
    assert any((needed.sum(axis=1) == 2).all() for needed in one), "an ensemble of two needs two"


def test_best_versions_stand_beside_the_last_and_nothing_is_run_twice(
    snapshot: RunSnapshot, found: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each path's best modules are another's last."""
    experiment = snapshot.config.experiment.model_copy(update={"early_stopping": EarlyStoppingConfig()})
    state = snapshot.state.copy()
    modules = [tuple(path.modules) for path in reversed(snapshot.paths())]
    state.apply([Best(path_index, 1, modules[path_index], 1.0, 1) for path_index in range(4)])
    config = snapshot.config.model_copy(update={"experiment": experiment})
    swapped = RunSnapshot(snapshot.run_dir, config, state, [])
    ran: list[str] = []
    of_tasks = LocalTasks.output

    def noted(tasks: LocalTasks, spec: EvaluateSpec, name: str, progress: Progress) -> bytes:
        ran.append(name)
        return of_tasks(tasks, spec, name, progress)

    monkeypatch.setattr(LocalTasks, "output", noted)
    both = cloze_run(swapped, FORM, split="test", routes=PATHS)
    assert both["accuracy"]["dipaco"] == {route: found["accuracy"]["dipaco"][route] for route in PATHS}
    assert list(both["accuracy"]["dipaco-best"].values()) == list(both["accuracy"]["dipaco"].values())[::-1]
    assert len(ran) == 2 * (3 + 4), "endings and endings alone, of three dense models and four paths"
    assert "dipaco" not in cloze_run(swapped, FORM, split="test", routes=PATHS[:1], versions=["best"])["accuracy"]


def test_the_command_prints_the_same_every_time(tiny_run: tuple[Path, Any], found: dict[str, Any]) -> None:
    routes = [word for route in [*CAUSAL, *PATHS] for word in ("--route", route)]
    form = ["--items", "40", "--context", "32", "--ending", "8", "--split", "test"]
    done = dipaco("cloze", "runs/tiny", *form, *routes, "--json", cwd=tiny_run[0])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(json.dumps(found))


def test_a_form_that_does_not_fit_is_one_sentence(tiny_run: tuple[Path, Any]) -> None:
    done = dipaco("cloze", "runs/tiny", cwd=tiny_run[0])
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "dipaco: a context of 64 and an ending of 16 tokens do not fit into the run's sequences of 64 (one of them "
        "BOS); give a shorter --context or --ending"
    )


def test_the_table_shows_models_and_domains(found: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(width=250, file=io.StringIO(), record=True)
    console.print(cloze_table({**found, "left_out": ["rare"]}))
    text = console.export_text()
    for words in ("dipaco ensemble:2", "dense-nesterov", "guessing", "25.0%", "recipe", "few documents", "rare"):
        assert words in text


def test_what_a_run_cannot_do_is_refused(snapshot: RunSnapshot) -> None:
    for routes, error, sentence in (
        (["router:16"], Refused, "need a trained router LM"),
        (["oracle:every:16"], Refused, "looks at the ending"),
        (["sideways"], UnknownRoute, "route 'sideways' is none of"),
    ):
        with pytest.raises(error, match=sentence):
            cloze_run(snapshot, FORM, routes=routes)
    with pytest.raises(Refused, match="split 'train' is none of validation, test"):
        cloze_run(snapshot, FORM, split="train")
    with pytest.raises(RunUnusable, match="keeps no best versions"):
        cloze_run(snapshot, FORM, versions=["best"])


def test_without_routes_those_of_the_run_that_need_no_ending(snapshot: RunSnapshot) -> None:
    assert default_routes(snapshot) == CAUSAL
