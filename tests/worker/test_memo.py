"""Results computed before: what makes two tasks one, what is believed, and a run that computes nothing anew."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.schema import Config, Experiment, ShardingConfig
from protocol.tasks import BlobRef, Checkpoint, PackSpec, TaskResult, TrainSpec
from scripts.experiment_measurement import describe
from tests.command_line import dipaco
from tests.played_run import Played, config_of, played
from worker.memo import Memo, memo_key
from worker.outcome import TaskOutcome, blob_of, no_progress
from worker.task import AnySpec, inputs, run_task

ROOM = 1 << 20
BASELINES = """  baselines:
    - {name: dense, outer: {kind: assign}}
    - {name: dense-nesterov, outer: {kind: nesterov}}
"""


SEEN: set[str] = set()


class WatchedSharding(ShardingConfig):
    """Notes which of its values are read."""

    def __getattribute__(self, name: str) -> Any:
        if name in ShardingConfig.model_fields:
            SEEN.add(f"sharding.{name}")
        return super().__getattribute__(name)


class WatchedExperiment(Experiment):
    """Notes which of its sections are read."""

    def __getattribute__(self, name: str) -> Any:
        if name in Experiment.model_fields and name != "sharding":
            SEEN.add(name)
        return super().__getattribute__(name)

    def first_phase(self, phase: int) -> int:
        SEEN.add("first_phase")
        stages = SEEN & {"stages"}
        found = super().first_phase(phase)
        SEEN.intersection_update(SEEN - {"stages"} | stages)
        return found


def watched(experiment: Experiment) -> Experiment:
    sections = {name: getattr(experiment, name) for name in Experiment.model_fields}
    sharding = WatchedSharding.model_construct(**dict(experiment.sharding))
    found = WatchedExperiment.model_construct(**{**sections, "sharding": sharding})
    SEEN.clear()
    return found


def specs_of(folder: Path) -> list[AnySpec]:
    """The specs of all tasks of a small run, whose worker reads the experiment under watch."""
    found: list[AnySpec] = []
    config = config_of(folder, reshard=True)
    experiment = watched(config.experiment)

    class Watching(Played):
        def compute(self, lease: Any) -> TaskOutcome:
            found.append(lease.spec)
            blobs = [blob.digest for of in inputs(lease.spec).values() for blob in of]
            files = {digest: self.run_dir / "blobs" / digest for digest in blobs}
            out_dir = Path(tempfile.mkdtemp(dir=self.run_dir))
            return run_task(lease.spec, experiment, files, out_dir, no_progress)

    async def finish() -> None:
        async with played(config, folder / "run", Watching) as run:
            await run.finish()

    asyncio.run(finish())
    return found


def test_a_task_reads_nothing_that_its_key_leaves_out(tmp_path: Path) -> None:
    specs = specs_of(tmp_path)
    assert {type(spec).__name__ for spec in specs} == {"PackSpec", "FeaturizeSpec", "TrainSpec", "EvaluateSpec"}
    assert {"model", "topology", "inner", "first_phase", "sharding.prefix_tokens"} >= SEEN
    experiment = config_of(tmp_path, reshard=True).experiment
    keys = [memo_key(spec, experiment, "here") for spec in specs]
    assert len(set(keys)) == len(keys), "no two tasks of a run are one"


def train_spec(**changes: Any) -> TrainSpec:
    plain: dict[str, Any] = {
        "path": {"model": "mixture", "path_index": 0, "modules": []},
        "shard": 0,
        "tokens": [],
        "inner_state": None,
        "adam_step": 0,
        "phase": 0,
        "first_step": 2,
        "steps": 2,
        "total_steps": 6,
        "shard_step": 0,
        "order_seed": 1,
        "outer": "nesterov",
        "numerics": {"device": "cpu", "dtype": "float32"},
    }
    return TrainSpec.model_validate({**plain, **changes})


def changed(config: Config, **sections: Any) -> Experiment:
    document = config.model_dump(mode="json")["experiment"]
    return Experiment.model_validate({**document, **sections})


def test_what_decides_the_bits_decides_the_key(tmp_path: Path) -> None:
    config = config_of(tmp_path, reshard=True)
    plain, spec = config.experiment, train_spec()
    key = memo_key(spec, plain, "here")
    assert key is not None
    other_rate = changed(config, inner={**plain.inner.model_dump(), "learning_rate": 0.5})
    assert memo_key(spec, other_rate, "here") != key
    assert memo_key(spec, plain, "elsewhere") != key
    assert memo_key(train_spec(order_seed=2), plain, "here") != key
    for section in ({"outer": {"learning_rate": 0.1}}, {"seed": 9}, {"evaluation": {"split": "validation"}}):
        assert memo_key(spec, changed(config, **section), "here") == key, section
    assert memo_key(train_spec(required_bytes=5), plain, "here") == key
    pack = PackSpec(mode="gather")
    assert memo_key(pack, other_rate, "here") == memo_key(pack, plain, "here")


def test_what_goes_on_from_a_checkpoint_is_computed(tmp_path: Path) -> None:
    blob = BlobRef(digest="0" * 64, size=1)
    checkpoint = Checkpoint(blob=blob, steps=1, tokens=1, sequences=1, loss_sum=1.0, step_losses=[1.0], seconds=1.0)
    assert memo_key(train_spec(resume=checkpoint), config_of(tmp_path).experiment, "here") is None


@pytest.fixture
def kept(tmp_path: Path) -> tuple[Memo, TaskOutcome]:
    memo = Memo(tmp_path / "memo", ROOM)
    files = {"tokens": tmp_path / "tokens", "more": tmp_path / "more"}
    for name, path in files.items():
        path.write_bytes(f"some {name}".encode())
    outputs = {name: blob_of(path) for name, path in files.items()}
    outcome = TaskOutcome(files, TaskResult(outputs=outputs, tokens=3, seconds=0.5))
    memo.remember("k" * 64, outcome)
    return memo, outcome


def test_what_was_kept_comes_back(kept: tuple[Memo, TaskOutcome], tmp_path: Path) -> None:
    memo, outcome = kept
    found = memo.recall("k" * 64, tmp_path / "out")
    assert found is not None
    assert found.result == outcome.result.model_copy(update={"reused": True})
    assert {name: path.read_bytes() for name, path in found.files.items()} == {
        "tokens": b"some tokens",
        "more": b"some more",
    }
    assert outcome.files["tokens"].is_file(), "the worker still uploads its own file"
    assert memo.recall("n" * 64, tmp_path / "none") is None


def _damage(path: Path) -> None:
    path.write_bytes(b"other bytes")


@pytest.mark.parametrize("harm", [_damage, Path.unlink])
def test_a_damaged_or_lost_output_is_computed_again(
    harm: Callable[[Path], None], kept: tuple[Memo, TaskOutcome], tmp_path: Path
) -> None:
    memo, outcome = kept
    blob = outcome.result.outputs["tokens"]
    copy = tmp_path / "copy"
    shutil.copy(tmp_path / "memo" / blob.digest, copy)
    (tmp_path / "memo" / blob.digest).unlink()
    shutil.move(copy, tmp_path / "memo" / blob.digest)  # a file of its own, not the output under another name
    harm(tmp_path / "memo" / blob.digest)
    assert memo.recall("k" * 64, tmp_path / "out") is None
    assert not (tmp_path / "out").exists(), "what is computed instead is not written over what is kept"
    assert len(list((tmp_path / "memo").glob("[0-9a-f]*"))) == 1, "and nothing else goes with it"
    memo.remember("k" * 64, outcome)
    assert memo.recall("k" * 64, tmp_path / "out") is not None


def test_a_folder_that_gives_nothing_harms_no_task(
    kept: tuple[Memo, TaskOutcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    memo, outcome = kept
    monkeypatch.setattr("worker.memo.os.link", full)
    monkeypatch.setattr("worker.memo.shutil.copyfile", full)
    assert memo.recall("k" * 64, tmp_path / "out") is None
    memo.remember("o" * 64, outcome)


def test_an_entry_that_is_no_result_is_forgotten(kept: tuple[Memo, TaskOutcome], tmp_path: Path) -> None:
    memo, _ = kept
    entry = tmp_path / "memo" / "results" / ("k" * 64)
    entry.write_text("{}garbage")
    assert memo.recall("k" * 64, tmp_path / "out") is None
    assert not entry.exists()


def test_a_second_run_computes_nothing_that_the_first_one_has(
    tmp_path: Path, prepare_tiny: Callable[[Path], Path]
) -> None:
    config = prepare_tiny(tmp_path)
    text = config.read_text(encoding="utf-8")
    for long, short in (("phases: 2", "phases: 1"), ("max_sequences: 400", "max_sequences: 10"), (BASELINES, "")):
        assert long in text
        text = text.replace(long, short)
    config.write_text(text, encoding="utf-8")
    (tmp_path / "other.yaml").write_text(text.replace("kind: nesterov", "kind: nesterov, momentum: 0.5"))
    reuse = ("--workers", "1", "--reuse", "kept")
    digests = []
    for name, file in (("a", "tiny.yaml"), ("b", "tiny.yaml"), ("c", "other.yaml")):
        dipaco("run", file, "--run-dir", name, *reuse, cwd=tmp_path)
        digests.append(dipaco("digest", name, "--all", cwd=tmp_path).stdout)
    logs = [(tmp_path / name / "logs" / "worker-0.log").read_text() for name in "abc"]
    tasks, recalled = ([log.count(words) for log in logs] for words in (": done in", "computed before"))
    assert (recalled[0], recalled[1]) == (0, tasks[1])
    assert tasks[0] == tasks[1]
    assert digests[0] == digests[1] != digests[2]
    assert 0 < recalled[2] < tasks[2]
    assert [describe(tmp_path / name)["reused_tasks"] for name in "abc"] == recalled
