"""Partial progress: a task that goes on from any of its checkpoints ends with the same bits."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from model import tensor_file
from model.store import file_digest
from protocol.errors import Unavailable
from protocol.tasks import Checkpoint, TrainSpec
from worker.checkpoints import Checkpoints, Snapshot
from worker.outcome import HandedBack, TaskOutcome, no_progress
from worker.pace import Pace
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

    def offer(self, take: object) -> None:
        super().offer(take)  # type: ignore[arg-type]
        self.wait(30.0)


def train(run: TinyRun, spec: TrainSpec, name: str, checkpoints: Checkpoints | None = None) -> TaskOutcome:
    out_dir = run.root / name
    out_dir.mkdir(exist_ok=True)
    files = (run.modules, [run.tokens], None, out_dir)
    return run_train(spec, run.experiment, run.vocab_size, *files, no_progress, checkpoints)


@pytest.mark.parametrize("outer", ["assign", "nesterov"])
def test_any_checkpoint_leads_to_the_same_bits(make_run: MakeRun, outer: str) -> None:
    run = make_run()
    spec = run.train_spec(run.add_modules("mixture", path_index=1), steps=6, outer=outer)
    whole = train(run, spec, "whole")
    kept = Kept(run.root / "kept")
    watched = train(run, spec, "watched", EveryStep(kept.send, Always(), run.root, print))
    assert watched.result.outputs == whole.result.outputs, "taking checkpoints changes nothing"
    assert [checkpoint.steps for checkpoint, _ in kept.all] == [1, 2, 3, 4, 5]
    for checkpoint, path in kept.all:
        assert file_digest(path) == (checkpoint.blob.digest, checkpoint.blob.size)
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
    checkpoints = Checkpoints(kept.send, Pace(1000.0), run.root, print)

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
        checkpoints.offer(snapshot)
        assert entered.wait(20.0)
    go_on.set()
    checkpoints.wait(20.0)
    assert sent == [1]


def test_what_cannot_be_sent_is_said_and_disturbs_nothing(tmp_path: Path) -> None:
    said: list[str] = []

    def send(path: Path, checkpoint: Checkpoint) -> None:
        raise Unavailable("nobody answers")

    checkpoints = Checkpoints(send, Always(), tmp_path, said.append)
    checkpoints.offer(snapshot)
    checkpoints.wait(20.0)
    assert said == ["partial progress was not kept (nobody answers); the task goes on"]
    checkpoints.end()
    checkpoints.offer(snapshot)
    checkpoints.wait(20.0)
    assert len(said) == 1, "nobody is told of what was given up"


def test_handing_over_waits_no_longer_than_the_grace(tmp_path: Path) -> None:
    stuck = threading.Event()

    def send(path: Path, checkpoint: Checkpoint) -> None:
        stuck.wait(60)

    checkpoints = Checkpoints(send, Always(), tmp_path, print, grace_s=0.2)
    began_s = time.monotonic()
    checkpoints.hand_over(snapshot)
    assert not stuck.is_set()
    assert time.monotonic() - began_s < 30
    stuck.set()
