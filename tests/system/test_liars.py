"""Workers that send wrong outer gradients, over real gRPC: they are found out, and the run keeps its bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.schema import Config
from coordinator.evidence import evidence_dir
from coordinator.journal import Journal
from coordinator.state import Task
from model import tensor_file
from protocol.tasks import TrainSpec
from tests.crew import PATIENCE_S, Crew, config_for
from tests.small_run import undisturbed_digest

LONG = 8


def scaled(factor: float, from_phase: int) -> Callable[[str, dict[str, Any]], dict[str, Any]]:
    """Outer gradients of the train stage times `factor`, from a phase on."""

    def lie(task_id: str, tensors: dict[str, Any]) -> dict[str, Any]:
        stage, _, phase, _ = task_id.split("/")
        if stage != "train" or int(phase) < from_phase:
            return tensors
        return {name: values * np.float32(factor) for name, values in tensors.items()}

    return lie


def slightly_wrong(task_id: str, tensors: dict[str, Any]) -> dict[str, Any]:
    """One value moved by a thousandth of the tensor's range: nothing that a norm would show."""
    name = min(tensors)
    tensors[name].flat[0] += 1e-3 * max(1e-6, float(np.ptp(tensors[name])))
    return tensors


def new_crew(folder: Path, config: Callable[[Path], Config], monkeypatch: pytest.MonkeyPatch) -> Crew:
    folder.mkdir()
    crew = Crew(folder, config(folder), monkeypatch)
    crew.start()
    return crew


def crew_of_a_liar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Crew:
    """All tasks are audited: mallory has lied about one, bob works beside it, and a third is still to come."""
    crew = new_crew(tmp_path / "run", lambda folder: config_for(folder, audit_share=1.0), monkeypatch)
    crew.waits = lambda spec: isinstance(spec, TrainSpec)
    crew.hire("mallory", slightly_wrong)
    crew.hire("bob")
    assert crew.lied.wait(PATIENCE_S)
    return crew


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the run comes to without audits and without liars."""
    return undisturbed_digest(tmp_path_factory.mktemp("undisturbed"))


def test_a_slightly_wrong_result_is_caught_by_an_audit(
    tmp_path: Path, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    crew = crew_of_a_liar(tmp_path, monkeypatch)
    crew.hire("ann")
    snapshot = crew.finished()
    status = snapshot.status()
    assert list(status["banned"]) == ["mallory"], crew.said
    assert "is banned from this run: its result of task" in crew.refused["mallory"]
    assert crew.digest() == expected
    task_id = status["banned"]["mallory"].split()[4]
    check_evidence(evidence_dir(crew.run_dir, task_id), task_id)
    assert any(f"task {task_id}: mallory differs from" in line for line in crew.said)
    [metric] = [metric for metric in snapshot.metrics if metric["task_id"] == task_id]
    assert "mallory differs" in metric["note"]
    assert metric["worker"] != "mallory"
    assert {path.name for path in (crew.run_dir / "evidence").iterdir()} == {task_id.replace("/", "-")}


def check_evidence(folder: Path, task_id: str) -> None:
    """Both results are there, with what tells them apart."""
    evidence = json.loads((folder / "evidence.json").read_text(encoding="utf-8"))
    assert evidence["task_id"] == task_id
    by_worker = {claim["worker"]: claim for claim in evidence["claims"]}
    liar = by_worker.pop("mallory")
    assert len(by_worker) == 2
    assert liar["banned"]
    assert not liar["counted"]
    assert [claim["counted"] for claim in by_worker.values()].count(True) == 1
    [counted] = [claim for claim in by_worker.values() if claim["counted"]]
    for output, digest in liar["digests"].items():
        mine, theirs = (folder / f"{claim['fence']}-{output}.safetensors" for claim in (liar, counted))
        apart = max(
            float(np.max(np.abs(a - b), initial=0.0))
            for a, b in zip(tensor_file.read(mine).values(), tensor_file.read(theirs).values(), strict=True)
        )
        assert liar["differences"][output]["max"] == pytest.approx(apart, rel=1e-5)
        assert (apart > 0.0) == (digest != counted["digests"][output])
    assert any(difference["norm"] > 0.0 for difference in liar["differences"].values())
    assert {"fingerprint", "norms", "wall_s", "identity", "result"} <= liar.keys()


def test_scaled_outer_gradients_wait_in_quarantine_and_never_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = new_crew(tmp_path / "honest", lambda folder: config_for(folder, phases=LONG), monkeypatch)
    honest.hire("ann")
    expected = honest.digest()
    assert not any("quarantine" in line for line in honest.said)
    crew = new_crew(tmp_path / "run", lambda folder: config_for(folder, phases=LONG), monkeypatch)
    crew.waits = lambda spec: isinstance(spec, TrainSpec) and spec.phase >= 5 and spec.path.model == "mixture"
    crew.hire("mallory", scaled(1000.0, from_phase=5))
    crew.hire("ann")
    assert crew.digest() == expected
    status = crew.finished().status()
    assert list(status["suspected"]) == ["mallory"]
    assert status["suspected"]["mallory"]
    assert not status["banned"]
    assert not status["quarantined"]
    assert any("the result of mallory waits in quarantine: the outer gradient of module" in line for line in crew.said)
    task_id = status["suspected"]["mallory"][0]
    evidence = json.loads((evidence_dir(crew.run_dir, task_id) / "evidence.json").read_text(encoding="utf-8"))
    assert [claim["counted"] for claim in evidence["claims"]] == [False, True]


def test_a_restart_between_claims_loses_none_and_keeps_the_bits(
    tmp_path: Path, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coordinator stops when one claim is made; the liar is banned by what comes after the restart."""
    crew = crew_of_a_liar(tmp_path, monkeypatch)
    crew.stop()
    journal = Journal(crew.run_dir, read_only=True)
    claims = [claim for row in journal.rows() if isinstance(row, Task) for claim in row.claims]
    journal.close()
    assert "mallory" in [claim.worker for claim in claims]
    blobs = {ref.digest for claim in claims for ref in claim.outputs.values()}
    assert all((crew.run_dir / "blobs" / digest).is_file() for digest in blobs)
    crew.start()
    crew.hire("ann")
    assert crew.digest() == expected
    assert list(crew.finished().status()["banned"]) == ["mallory"]
