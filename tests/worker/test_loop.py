"""The worker's loop against a coordinator made of lists: order of calls, failures, lost leases, leaving on SIGTERM."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from configs.execution import Execution
from configs.schema import Config
from model.store import file_digest
from protocol.errors import Banned, Forbidden, NotAllowed, StaleLease, Unavailable, UnknownBlob, UnknownTask
from protocol.tasks import BlobRef, Capabilities, Checkpoint, TaskResult, TrainSpec
from protocol.tensors import UploadHeader
from worker import departure, loop
from worker.client import Lease, Pulse, Welcome
from worker.leased_task import reason_of
from worker.loop import Worker
from worker.pace import Pace
from worker.train import run_train

if TYPE_CHECKING:
    from tests.worker.conftest import MakeRun, TinyRun

# What a worker that leaves the run releases: whatever it holds, for no reason.
LEFT = ("", "", True)
OFFER = Capabilities(devices=["cpu"], memory_bytes=10**9, threads=1, fingerprint="made up")


class FakeCoordinator:
    """Hands out the given specs one after the other, then says that the run is finished; remembers what it was told."""

    def __init__(self, run: TinyRun, specs: Sequence[TrainSpec], execution: Execution) -> None:
        self.config = Config(name="tiny", experiment=run.experiment, execution=execution)
        self.specs = list(specs)
        self.blobs = {file_digest(path)[0]: path for path in [*run.modules.values(), run.tokens]}
        self.fetched: list[str] = []
        self.uploads: dict[str, tuple[UploadHeader, bytes]] = {}
        self.completed: dict[str, TaskResult] = {}
        self.released: list[tuple[str, str, bool]] = []
        self.cached: list[list[str]] = []
        self.progress: list[Checkpoint] = []
        self.beats: Counter[str] = Counter()
        self.leased = 0
        self.heartbeat_s = 30.0
        self.finishes = self.counts = True
        self.on_beat: Callable[[int], bool] = lambda steps: False
        self.on_upload: Callable[[], None] = lambda: None
        self.waiting, self.closed = threading.Event(), threading.Event()

    def hello(self, worker_name: str, capabilities: Capabilities, worker_id: str = "") -> Welcome:
        return Welcome("w1", "tiny", self.config.model_dump_json(), self.heartbeat_s, 1 << 20)

    def lease(self, worker_id: str, wait_s: float, cached_digests: Sequence[str] = ()) -> Lease:
        assert worker_id == "w1"
        self.cached.append(list(cached_digests))
        if not self.specs:
            if not self.finishes:
                self.waiting.set()
                for _ in range(1000):  # short waits, as in gRPC: a signal may reach another thread first
                    time.sleep(0.01)
                raise AssertionError("the wait was not cut short")
            return Lease("", 0, 0.0, None, "", finished=True)
        self.leased += 1
        return Lease(f"train/TRAIN/{self.leased}/0", self.leased, 10.0, self.specs.pop(0), "", finished=False)

    def heartbeat(
        self, worker_id: str, task_id: str, fence: int, *, steps: int = 0, loss: float = float("nan"), tokens: int = 0
    ) -> Pulse:
        self.beats[task_id] += 1
        return Pulse(self.on_beat(steps), 10.0)

    def complete(self, worker_id: str, task_id: str, fence: int, result: TaskResult) -> bool:
        assert {name: (header.digest, header.size) for name, (header, _) in self.uploads.items()} == {
            name: (blob.digest, blob.size) for name, blob in result.outputs.items()
        }
        self.completed[task_id] = result
        self.uploads = {}
        return not self.counts

    def save_progress(self, worker_id: str, task_id: str, fence: int, checkpoint: Checkpoint) -> bool:
        header, _ = self.uploads.pop("checkpoint")
        assert (header.kind, header.digest) == ("checkpoint", checkpoint.blob.digest)
        self.progress.append(checkpoint)
        return True

    def release(self, worker_id: str, task_id: str, fence: int, reason: str = "", *, leaving: bool = False) -> None:
        self.released.append((task_id, reason, leaving))

    def fetch_to(self, digest: str, path: Path) -> int:
        if digest not in self.blobs:
            raise UnknownBlob(f"no blob {digest}")
        self.fetched.append(digest)
        path.write_bytes(self.blobs[digest].read_bytes())
        return path.stat().st_size

    def upload(self, path: Path, header: UploadHeader) -> int:
        self.on_upload()
        assert file_digest(path) == (header.digest, header.size)
        self.uploads[header.output] = (header, path.read_bytes())
        return header.size

    def close(self) -> None:
        self.closed.set()


class Stage:
    """A worker with its fake coordinator."""

    def __init__(
        self, run: TinyRun, specs: Sequence[TrainSpec], grace_s: float = 10.0, reuse: Path | None = None
    ) -> None:
        self.coordinator = FakeCoordinator(run, specs, Execution(grace_s=grace_s))
        self.said: list[str] = []
        self.cache = run.root / "cache"
        self.worker = Worker(
            lambda patience_s: self.coordinator, self.cache, "me", OFFER, self.said.append, None, reuse
        )

    def run(self) -> int:
        return self.worker.run()


@pytest.fixture
def run(make_run: MakeRun) -> TinyRun:
    return make_run()


def test_leases_runs_uploads_and_completes_until_the_run_is_finished(run: TinyRun) -> None:
    path = run.add_modules("base")
    spec = run.train_spec(path, outer="assign")
    stage = Stage(run, [spec, spec])
    assert stage.run() == 0
    coordinator = stage.coordinator
    first, second = coordinator.completed.values()
    expected = run_train(spec, run.experiment, run.vocab_size, run.modules, [run.tokens], None, run.root)
    assert first.outputs == second.outputs == expected.result.outputs
    assert first.step_losses == expected.result.step_losses
    sizes = {digest: file.stat().st_size for digest, file in coordinator.blobs.items()}
    tokens = spec.tokens[0].digest
    assert first.fetched_bytes == {
        "modules": sum(size for digest, size in sizes.items() if digest != tokens),
        "other": sizes[tokens],
    }
    assert sum(second.fetched_bytes.values()) == 0
    assert len(coordinator.fetched) == len(set(coordinator.fetched))
    assert coordinator.released == [LEFT]
    assert stage.said[-1] == "the run is finished"
    assert not list((stage.cache / "outputs").iterdir())


def test_what_it_made_itself_need_not_be_fetched(run: TinyRun) -> None:
    path = run.add_modules("base")
    first = run.train_spec(path, outer="assign")
    outputs = run_train(first, run.experiment, run.vocab_size, run.modules, [run.tokens], None, run.root).result.outputs
    modules = [module.model_copy(update={"blob": outputs[module.module_id]}) for module in path.modules]
    after = path.model_copy(update={"modules": modules})
    steps = {"inner_state": outputs["inner_state"], "adam_step": 4, "first_step": 4, "shard_step": 4}
    stage = Stage(run, [first, run.train_spec(after, **steps)])
    stage.run()
    assert sum(stage.coordinator.completed["train/TRAIN/2/0"].fetched_bytes.values()) == 0
    assert set(stage.coordinator.cached[0]) == set()


def test_what_has_counted_is_not_computed_again_unless_it_is_leased_again(run: TinyRun, tmp_path: Path) -> None:
    spec = run.train_spec(run.add_modules("base"), outer="assign")
    first, second = Stage(run, [spec, spec], reuse=tmp_path / "kept"), Stage(run, [spec], reuse=tmp_path / "kept")
    first.run()
    computed, again = first.coordinator.completed.values()
    assert (computed.reused, again.reused) == (False, False), "the second lease asks for a second opinion"
    second.run()
    (kept,) = second.coordinator.completed.values()
    assert (kept.reused, kept.fetched_bytes) == (True, {})
    assert (kept.outputs, kept.step_losses) == (computed.outputs, computed.step_losses)
    assert second.coordinator.fetched == []


def test_what_did_not_count_is_not_kept(run: TinyRun, tmp_path: Path) -> None:
    spec = run.train_spec(run.add_modules("base"), outer="assign")
    first, second = Stage(run, [spec], reuse=tmp_path / "kept"), Stage(run, [spec], reuse=tmp_path / "kept")
    first.coordinator.counts = False
    first.run()
    second.run()
    assert [result.reused for result in second.coordinator.completed.values()] == [False]


def test_headers_declare_the_tensors(run: TinyRun) -> None:
    stage = Stage(run, [run.train_spec(run.add_modules("base"))])
    seen: dict[str, UploadHeader] = {}
    stage.coordinator.on_upload = lambda: seen.update({n: h for n, (h, _) in stage.coordinator.uploads.items()})
    stage.run()
    assert seen["0.0"].kind == "module"
    assert ("model.embed_tokens.weight", "float32", [96, 32]) in seen["0.0"].tensors
    assert (seen["0.0"].task_id, seen["0.0"].fence) == ("train/TRAIN/1/0", 1)


def test_a_failed_task_is_released_with_its_reason_and_the_next_is_taken(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run.add_modules("base")
    missing = run.train_spec(path, inner_state=BlobRef(digest="0" * 64, size=1))
    stage = Stage(run, [missing, run.train_spec(path)])
    monkeypatch.setattr(stage.worker.departure.asked, "wait", lambda timeout: False)
    assert stage.run() == 0
    (task_id, reason, leaving), left = stage.coordinator.released
    assert left == LEFT
    assert (task_id, leaving) == ("train/TRAIN/1/0", False)
    assert reason == f"UnknownBlob: no blob {'0' * 64}"
    assert list(stage.coordinator.completed) == ["train/TRAIN/2/0"]


def test_a_task_whose_lease_is_lost_is_dropped(run: TinyRun) -> None:
    path = run.add_modules("base")
    stage = Stage(run, [run.train_spec(path, steps=100_000), run.train_spec(path)])
    stage.coordinator.heartbeat_s = 0.01
    stage.coordinator.on_beat = lambda steps: stage.coordinator.leased == 1 and steps > 0
    assert stage.run() == 0
    assert stage.coordinator.released == [LEFT]
    assert list(stage.coordinator.completed) == ["train/TRAIN/2/0"]
    assert any("its lease is lost" in line for line in stage.said)


@pytest.mark.parametrize("kind", [Forbidden, Banned])
def test_a_worker_that_is_shut_out_stops_its_task_at_the_next_beat(run: TinyRun, kind: type[Exception]) -> None:
    stage = Stage(run, [run.train_spec(run.add_modules("base"), steps=100_000)])
    stage.coordinator.heartbeat_s = 0.01

    def refuse(steps: int) -> bool:
        raise kind("no longer let in")

    stage.coordinator.on_beat = refuse
    assert stage.run() == 0
    assert stage.coordinator.completed == {}
    assert any("its lease is lost" in line for line in stage.said)


@pytest.mark.parametrize("refusal", [StaleLease("fence 1 is over"), UnknownTask("there is no such task")])
def test_a_refused_upload_drops_the_task(run: TinyRun, refusal: Exception) -> None:
    path = run.add_modules("base")
    stage = Stage(run, [run.train_spec(path), run.train_spec(path)])

    def refuse() -> None:
        if stage.coordinator.leased == 1:
            raise refusal

    stage.coordinator.on_upload = refuse
    assert stage.run() == 0
    assert stage.coordinator.released == [LEFT]
    assert list(stage.coordinator.completed) == ["train/TRAIN/2/0"]


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_hands_a_long_task_back_at_once(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "Pace", lambda **_: Pace(1e9))  # no checkpoint but that of the departure
    stage = Stage(run, [run.train_spec(run.add_modules("base"), steps=100_000)])
    stage.coordinator.heartbeat_s = 0.01
    sent = threading.Event()

    def beat(steps: int) -> bool:
        if steps > 1 and not sent.is_set():
            sent.set()
            terminate()
        return False

    stage.coordinator.on_beat = beat
    before = signal.getsignal(signal.SIGTERM)
    assert stage.run() == 0
    assert stage.coordinator.completed == {}
    [kept] = stage.coordinator.progress
    assert kept.steps > 1, "what it had is kept for the next holder"
    assert stage.coordinator.released == [LEFT]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_checkpoint_that_is_there_no_more_is_asked_for_again(run: TinyRun) -> None:
    """Another holder of the task has got farther meanwhile: the lease, asked for again, names the newer one."""
    blob = BlobRef(digest="e" * 64, size=1)
    outdated = Checkpoint(blob=blob, steps=1, tokens=1, sequences=1, loss_sum=1.0, step_losses=[1.0], seconds=1.0)
    spec = run.train_spec(run.add_modules("base"))
    stage = Stage(run, [spec.model_copy(update={"resume": outdated}), spec])
    assert stage.run() == 0
    assert stage.coordinator.released == [LEFT]
    assert len(stage.coordinator.completed) == 1


def test_sigterm_lets_a_task_finish_that_is_nearly_done(run: TinyRun) -> None:
    path = run.add_modules("base")
    stage = Stage(run, [run.train_spec(path, steps=60), run.train_spec(path)], grace_s=2000.0)
    stage.coordinator.heartbeat_s = 0.01
    sent = threading.Event()

    def beat(steps: int) -> bool:
        if steps and not sent.is_set():  # once: on a busy machine later beats come late enough to be a second request
            sent.set()
            terminate()
        return False

    stage.coordinator.on_beat = beat
    assert stage.run() == 0
    assert list(stage.coordinator.completed) == ["train/TRAIN/1/0"]
    assert stage.coordinator.released == [LEFT]


def test_sigterm_cuts_the_wait_for_a_task_short(run: TinyRun) -> None:
    stage = Stage(run, [])
    stage.coordinator.finishes = False
    run.add_modules("base")

    def when_waiting() -> None:
        assert stage.coordinator.waiting.wait(10)
        terminate()

    thread = threading.Thread(target=when_waiting)
    thread.start()
    assert stage.run() == 0
    thread.join()
    assert stage.coordinator.released == [LEFT]


def test_a_second_signal_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(departure, "SAME_REQUEST_S", 0.0)
    asked = departure.Departure(lambda: None)
    with asked.on_signals():
        terminate()
        assert asked.asked.is_set()
        with pytest.raises(KeyboardInterrupt):
            terminate()


def test_one_request_may_arrive_twice() -> None:
    asked = departure.Departure(lambda: None)
    with asked.on_signals():
        terminate()
        terminate()
        with pytest.raises(departure.Leave), asked.cuts_short():
            pass


def test_leaving_lets_go_of_calls_that_nobody_answers(run: TinyRun) -> None:
    stage = Stage(run, [run.train_spec(run.add_modules("base"))], grace_s=0.01)

    def silent() -> None:
        terminate()
        assert stage.coordinator.closed.wait(10)
        raise Unavailable("closed here")

    stage.coordinator.on_upload = silent
    assert stage.run() == 0
    assert stage.coordinator.completed == {}


def test_a_refusal_to_join_is_not_hidden(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(run, [])

    def refuse(*_: Any, **__: Any) -> Welcome:
        raise NotAllowed("the join token is wrong")

    monkeypatch.setattr(stage.coordinator, "hello", refuse)
    with pytest.raises(NotAllowed):
        stage.run()


def test_reasons_name_the_knob() -> None:
    assert reason_of(ValueError("what")) == "ValueError: what"
    assert "numerics.micro_batch_rows" in reason_of(MemoryError())
    assert "numerics.micro_batch_rows" in reason_of(RuntimeError("DefaultCPUAllocator: can't allocate memory: 1"))


def test_outputs_of_killed_workers_are_removed(run: TinyRun) -> None:
    left = run.root / "cache" / "outputs" / "worker-killed" / "task"
    left.mkdir(parents=True)
    (left / "0.0").write_bytes(b"half")
    run.add_modules("base")
    Stage(run, []).run()
    assert not left.exists()
