"""Partial progress: a task that goes on from any of its checkpoints ends with the same bits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from model import tensor_file
from model.inner_state import checkpoint_tensors
from model.layout import path_tensors
from model.store import file_digest
from protocol.errors import Unavailable
from protocol.tasks import Checkpoint, TrainSpec
from worker.checkpoints import Checkpoints, Snapshot
from worker.outcome import HandedBack, TaskOutcome, no_progress
from worker.pace import Pace
from worker.task_path import topology_of
from worker.train import run_train

if TYPE_CHECKING:
    from tests.worker.conftest import MakeRun, TinyRun


class Always(Pace):
    """Whatever it costs."""

    def __init__(self) -> None:
        super().__init__(0.0)

    def is_due(self, since_s: float) -> bool:
        return True


class Kept:
    """Keeps every checkpoint that is sent, and its file."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()
        self.all: list[tuple[Checkpoint, Path]] = []

    def send(self, path: Path, checkpoint: Checkpoint) -> None:
        copy = self.directory / f"{checkpoint.steps}"
        copy.write_bytes(path.read_bytes())
        self.all.append((checkpoint, copy))


class EveryStep(Checkpoints):
    """Sends each one before the next step, so that a test sees them all."""

    def offer(self, take: Callable[[], Snapshot], copy_bytes: int) -> None:
        super().offer(take, copy_bytes)
        self.wait(30.0)


def train(run: TinyRun, spec: TrainSpec, name: str, checkpoints: Checkpoints | None = None) -> TaskOutcome:
    out_dir = run.root / name
    out_dir.mkdir(exist_ok=True)
    files = (run.modules, [run.tokens], None, out_dir)
    return run_train(spec, run.experiment, run.vocab_size, *files, no_progress, checkpoints)


@pytest.mark.parametrize(
    ("optimizer", "inner_state", "outer"),
    [
        ("adamw", "keep", "assign"),
        ("adamw", "keep", "nesterov"),
        ("muon", "keep", "nesterov"),
        ("muon", "reset", "assign"),
    ],
)
def test_any_checkpoint_leads_to_the_same_bits(make_run: MakeRun, optimizer: str, inner_state: str, outer: str) -> None:
    run = make_run(inner={"optimizer": optimizer, "inner_state": inner_state})
    path_specs = path_tensors(run.experiment.model, run.vocab_size, topology_of(run.experiment, "base"))
    expected = {tensor.name: tensor.shape for tensor in checkpoint_tensors(run.experiment.inner, path_specs)}
    spec = run.train_spec(run.add_modules("mixture", path_index=1), steps=6, outer=outer)
    whole = train(run, spec, "whole")
    kept = Kept(run.root / "kept")
    watched = train(run, spec, "watched", EveryStep(kept.send, Always(), run.root, print))
    assert watched.result.outputs == whole.result.outputs, "taking checkpoints changes nothing"
    assert [checkpoint.steps for checkpoint, _ in kept.all] == [1, 2, 3, 4, 5]
    for checkpoint, path in kept.all:
        assert file_digest(path) == (checkpoint.blob.digest, checkpoint.blob.size)
        assert tensor_file.shapes(path) == expected
        resumed = spec.model_copy(update={"resume": checkpoint})
        name = f"from-{checkpoint.steps}"
        rest = train(run, resumed, name, Checkpoints(kept.send, None, run.root, print, resume_path=path))
        assert rest.result.outputs == whole.result.outputs
        assert rest.result.step_losses == whole.result.step_losses
        assert rest.result.resumed_steps == checkpoint.steps
        for counted in ("tokens", "sequences", "steps", "loss_sum"):
            assert getattr(rest.result, counted) == getattr(whole.result, counted)
        assert rest.result.seconds >= rest.result.resumed_seconds == checkpoint.seconds > 0


def test_a_checkpoint_of_another_model_is_refused(make_run: MakeRun) -> None:
    run = make_run()
    spec = run.train_spec(run.add_modules("base"))
    kept = Kept(run.root / "kept")
    train(run, spec, "whole", EveryStep(kept.send, Always(), run.root, print))
    checkpoint, path = kept.all[0]
    tensors = dict(tensor_file.read(path))
    del tensors["m.model.norm.weight"]
    tensor_file.write(run.root / "less", tensors)
    resumed = spec.model_copy(update={"resume": checkpoint})
    with pytest.raises(tensor_file.TensorMismatch, match=r"m\.model\.norm\.weight"):
        train(run, resumed, "rest", Checkpoints(kept.send, None, run.root, print, resume_path=run.root / "less"))


def test_a_worker_that_leaves_hands_over_what_it_has(make_run: MakeRun) -> None:
    run = make_run()
    spec = run.train_spec(run.add_modules("base"), steps=8)
    kept = Kept(run.root / "kept")
    checkpoints = Checkpoints(kept.send, Pace(1000.0), run.root, print, left_s=lambda: 30.0)

    def leave(steps: int, loss: float, tokens: int) -> None:
        if steps == 3:
            raise HandedBack

    with pytest.raises(HandedBack):
        run_train(spec, run.experiment, run.vocab_size, run.modules, [run.tokens], None, run.root, leave, checkpoints)
    assert [checkpoint.steps for checkpoint, _ in kept.all] == [3]


def snapshot() -> Snapshot:
    return Snapshot({"p.x": np.zeros(2, np.float32)}, 1, 1, 1.0, [1.0], 1.0)


def test_one_is_under_way_at_a_time_and_steps_do_not_wait_for_it(tmp_path: Path) -> None:
    entered, go_on = threading.Event(), threading.Event()
    sent: list[int] = []

    def send(path: Path, checkpoint: Checkpoint) -> None:
        entered.set()
        assert go_on.wait(20.0)
        sent.append(checkpoint.steps)

    checkpoints = Checkpoints(send, Always(), tmp_path, print)
    for _ in range(5):
        checkpoints.offer(snapshot, 8)
        assert entered.wait(20.0)
    go_on.set()
    checkpoints.wait(20.0)
    assert sent == [1]


def test_what_cannot_be_sent_is_said_once_and_tried_less_often(tmp_path: Path) -> None:
    said: list[str] = []

    def send(path: Path, checkpoint: Checkpoint) -> None:
        raise Unavailable("nobody answers")

    pace = Always()
    checkpoints = Checkpoints(send, pace, tmp_path, said.append)
    for _ in range(3):
        checkpoints.offer(snapshot, 8)
        checkpoints.wait(20.0)
    assert said == ["partial progress was not kept (nobody answers); the task goes on"]
    assert pace.failures == 3
    assert not list(tmp_path.iterdir()), "its file goes with it"


def test_no_copy_is_made_where_memory_lacks(tmp_path: Path) -> None:
    said: list[str] = []
    taken: list[Snapshot] = []

    def take() -> Snapshot:
        taken.append(snapshot())
        return taken[-1]

    Checkpoints(lambda *_: None, Always(), tmp_path, said.append).offer(take, 1 << 60)
    assert not taken
    assert "finds no memory" in said[0]


def test_the_copy_goes_as_soon_as_it_is_written(tmp_path: Path) -> None:
    """The upload may take long, and the steps need the memory."""
    copy = snapshot()
    assert copy.write(tmp_path / "file").steps == 1
    assert copy.tensors == {}


def test_handing_over_sends_the_newest_and_nothing_twice(tmp_path: Path) -> None:
    entered, go_on = threading.Event(), threading.Event()
    sent: list[int] = []

    def send(path: Path, checkpoint: Checkpoint) -> None:
        entered.set()
        assert go_on.wait(20)
        assert file_digest(path)[0] == checkpoint.blob.digest, "a later one has a file of its own"
        sent.append(checkpoint.steps)

    def after(steps: int) -> Callable[[], Snapshot]:
        value = np.full(2, steps, np.float32)
        return lambda: Snapshot({"p.x": value}, 1, 1, 1.0, [1.0] * steps, 1.0)

    checkpoints = Checkpoints(send, Always(), tmp_path, print, left_s=lambda: 0.2)
    checkpoints.offer(after(1), 8)
    assert entered.wait(20)
    checkpoints.hand_over(after(1), 8, 1)
    checkpoints.hand_over(after(2), 8, 2)
    go_on.set()
    checkpoints.wait(20.0)
    for _ in range(1000):
        if len(sent) == 2:
            break
        time.sleep(0.01)
    assert sorted(sent) == [1, 2]


def test_handing_over_waits_no_longer_than_the_grace(tmp_path: Path) -> None:
    stuck = threading.Event()

    def send(path: Path, checkpoint: Checkpoint) -> None:
        stuck.wait(60)

    checkpoints = Checkpoints(send, Always(), tmp_path, print, left_s=lambda: 0.1)
    began_s = time.monotonic()
    checkpoints.hand_over(snapshot, 8, 1)
    assert not stuck.is_set()
    assert time.monotonic() - began_s < 30
    stuck.set()
