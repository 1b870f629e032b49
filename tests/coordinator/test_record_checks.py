"""Liars among those who pack, featurize, score and measure: all are refused, and the run ends as without them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from configs.schema import Config
from coordinator.handlers import ReleaseArgs
from coordinator.snapshot import RunSnapshot
from corpus.token_file import SequenceIndex, TokenFile, write_token_file
from protocol.errors import RejectedTensor
from protocol.tasks import FeaturizeSpec
from routing.records import Assignments, Features, Losses, Routes
from scripts.crash_points import small_config
from tests.played_run import Played, digest, played
from worker.outcome import TaskOutcome, blob_of

Record = Features | Assignments | Routes | Losses
Lie = Callable[[Any], Record | bytes]


def config_of(folder: Path) -> Config:
    """A run with every kind of task: a re-shard, early stopping, a router LM, and both routers in the evaluation."""
    document: Any = small_config(folder, 90, reshard=True).model_dump(mode="json")
    experiment = document["experiment"]
    experiment["corpus"]["splits"] |= {"router": 0.2, "stop": 0.15, "test": 0.15}
    experiment["early_stopping"] = {"every": 1}
    experiment["stages"] += [{"kind": "router", "steps": 2, "inner_steps": 2, "window": 8}, {"kind": "evaluate"}]
    experiment["evaluation"] = {"routes": ["sequence", "every:16", "router:16"]}
    document["execution"]["lease_s"] = 600.0
    return Config.model_validate(document)


def play(folder: Path, script: Callable[[Played], Awaitable[None]]) -> Path:
    folder.mkdir()

    async def opened() -> None:
        async with played(config_of(folder), folder / "run") as run:
            await script(run)

    asyncio.run(opened())
    return folder / "run"


def changed(array: np.ndarray, value: Any) -> np.ndarray:
    """A copy with another first value."""
    copy = array.copy()
    copy.flat[0] = value
    return copy


def packed(record: Record, **fields: Any) -> bytes:
    return bytes(msgpack.packb(msgpack.unpackb(record.to_bytes()) | fields))


ANY_RECORD: dict[str, Lie] = {
    "one byte": lambda r: b"\xc0",
    "cut off": lambda r: r.to_bytes()[:-1],
    "a field more than there is room for": lambda r: packed(r, padding=bytes(10_000)),
    "a number that no array has": lambda r: packed(r, dim=2**63, top_n=2**63, paths=2**63, chunks=2**63),
}
LOSS_ARRAYS = ("positions", "loss", "count", "text_bytes", "domains")
LOSSES: dict[str, Lie] = {
    "other positions": lambda r: replace(r, positions=r.positions + np.uint32(10**6)),
    "no sequences": lambda r: replace(r, **{name: getattr(r, name)[:0] for name in LOSS_ARRAYS}),
    "fewer chunks": lambda r: replace(
        r, loss=r.loss[:, :-1].copy(), count=r.count[:, :-1].copy(), text_bytes=r.text_bytes[:, :-1].copy()
    ),
    "more targets": lambda r: replace(r, count=changed(r.count, r.count.flat[0] + 1)),
    "not a number": lambda r: replace(r, loss=changed(r.loss, np.nan)),
    "infinite": lambda r: replace(r, loss=changed(r.loss, np.inf)),
    "sums that overflow": lambda r: replace(r, loss=changed(r.loss, 1e300)),
    "better than certain": lambda r: replace(r, loss=changed(r.loss, -100.0)),
    "another domain": lambda r: replace(r, domain_names=("other", *r.domain_names[1:])),
}
FEATURES: dict[str, Lie] = {
    "other ids": lambda r: replace(r, ids=r.ids + np.uint64(1)),
    "fewer sequences": lambda r: Features(r.ids[1:], r.z[1:]),
    "fewer features": lambda r: replace(r, z=r.z[:, 1:].copy()),
    "not a number": lambda r: replace(r, z=changed(r.z, np.nan)),
}
ASSIGNMENTS: dict[str, Lie] = {
    "other ids": lambda r: replace(r, ids=r.ids[::-1].copy()),
    "no such shard": lambda r: replace(r, shards=changed(r.shards, 2)),
    "more choices": lambda r: Assignments(r.ids, np.repeat(r.shards, 2, axis=1), np.repeat(r.distances, 2, axis=1)),
    "not a number": lambda r: replace(r, distances=changed(r.distances, np.nan)),
}
ROUTES: dict[str, Lie] = {
    "other positions": lambda r: replace(r, positions=r.positions + np.uint32(1)),
    "more paths": lambda r: replace(r, posterior=np.pad(r.posterior, ((0, 0), (0, 1)))),
    "no such path": lambda r: replace(r, sequence=changed(r.sequence, 2)),
    "other intervals": lambda r: replace(r, every={8: r.every[16]}),
    "fewer chunks": lambda r: replace(r, every={16: r.every[16][:, :-1].copy()}),
}
# Of every (kind, mode) what its output may be instead.
LIES: dict[tuple[str, str], tuple[type[Record], dict[str, Lie]]] = {
    ("FEATURIZE", "sample"): (Features, FEATURES),
    ("FEATURIZE", "assign"): (Assignments, ASSIGNMENTS),
    ("FEATURIZE", "route"): (Routes, ROUTES),
    ("FEATURIZE", "look"): (Routes, ROUTES),
    ("SCORE", ""): (Losses, LOSSES),
    ("STOP", ""): (Losses, LOSSES),
    ("EVALUATE", ""): (Losses, LOSSES),
}


def instead(outcome: TaskOutcome, data: bytes) -> TaskOutcome:
    """The outcome with other bytes."""
    [(name, path)] = outcome.files.items()
    lie = path.with_name("lie")
    lie.write_bytes(data)
    return TaskOutcome({name: lie}, outcome.result.model_copy(update={"outputs": {name: blob_of(lie)}}))


def boast(outcome: TaskOutcome) -> TaskOutcome:
    """An honest output beside sums that it does not bear out."""
    told = {"loss_sum": 1e-9, "tokens": 2**40, "sequences": 2**40, "steps": 7, "step_losses": [0.0] * 7}
    return TaskOutcome(outcome.files, outcome.result.model_copy(update=told))


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return play(tmp_path_factory.mktemp("honest") / "of", Played.finish)


def test_a_run_that_is_lied_to_ends_as_without_lies(honest: Path, tmp_path: Path) -> None:
    told: dict[tuple[str, str], list[str]] = {}

    async def lied_to(run: Played) -> None:
        while not (lease := await run.lease()).finished:
            outcome = await asyncio.to_thread(run.compute, lease)
            kind = lease.task_id.split("/")[1], lease.spec.mode if isinstance(lease.spec, FeaturizeSpec) else ""
            if kind in LIES and kind not in told:
                record_type, lies = LIES[kind]
                [path] = outcome.files.values()
                record: Any = record_type.from_bytes(path.read_bytes())
                told[kind] = []
                for name, lie in {**ANY_RECORD, **lies}.items():
                    false = lie(record)
                    attempt = instead(outcome, false if isinstance(false, bytes) else false.to_bytes())
                    await run.upload(lease, attempt)
                    with pytest.raises(RejectedTensor, match=lease.task_id):
                        await run.complete(lease, attempt)
                    assert not run.coordinator.paused
                    told[kind].append(name)
            await run.upload(lease, outcome)
            await run.complete(lease, outcome if kind[0] == "TRAIN" else boast(outcome))

    run_dir = play(tmp_path / "lied to", lied_to)
    assert told.keys() == LIES.keys()
    assert digest(run_dir) == digest(honest)
    best = RunSnapshot.open(honest).state.best
    assert best
    assert RunSnapshot.open(run_dir).state.best == best, "what is best follows from the records, not from what is said"
    assert not list((run_dir / "spool").iterdir())
    held = {path.name for path in (run_dir / "blobs").iterdir() if len(path.name) == 64}
    assert held == set(RunSnapshot.open(run_dir).blobs()), "nothing that was refused is left"


def write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def token_lies(path: Path) -> dict[str, Callable[[Path], None]]:
    """Token files that differ from an honest one."""
    with TokenFile.open(path) as file:
        index = SequenceIndex(
            file.ids.copy(), file.lengths.copy(), file.domains.copy(), file.documents.copy(), tuple(file.domain_names)
        )
        tokens = [file.tokens(position).copy() for position in range(file.count)]
    shorter = [tokens[0][:-1], *tokens[1:]]
    lengths = np.array([len(each) for each in shorter], np.uint32)
    return {
        "no token file": lambda out: write(out, b"x" * 100),
        "an endless index": lambda out: write(out, b"DPTOKEN1" + b"\xff" * 100),
        "other ids": lambda out: write_token_file(out, replace(index, ids=index.ids + np.uint64(1)), "uint16", tokens),
        "other tokens": lambda out: write_token_file(out, index, "uint16", [changed(tokens[0], 60_000), *tokens[1:]]),
        "long sequences": lambda out: write_token_file(
            out,
            replace(index, lengths=index.lengths + np.uint32(64)),
            "uint16",
            [np.concatenate([each, np.zeros(64, np.uint16)]) for each in tokens],
        ),
        **(
            {"a shorter one": lambda out: write_token_file(out, replace(index, lengths=lengths), "uint16", shorter)}
            if len(tokens[0]) > 2
            else {}
        ),
    }


def test_token_files_that_were_not_asked_for_are_refused(tmp_path: Path) -> None:
    """A whole range is known by its ids alone: that a sequence of it is a token shorter shows when it is gathered."""

    async def lied_to(run: Played) -> None:
        for stage in ("corpus", "shard"):
            while not (lease := await run.until_leased("PACK")).task_id.startswith(stage):
                await run.task(lease)
            outcome = await asyncio.to_thread(run.compute, lease)
            [path] = outcome.files.values()
            for name, make in token_lies(path).items():
                if stage == "corpus" and name == "a shorter one":
                    continue
                make(tmp_path / "lie")
                attempt = instead(outcome, (tmp_path / "lie").read_bytes())
                await run.upload(lease, attempt)
                with pytest.raises(RejectedTensor, match=lease.task_id):
                    await run.complete(lease, attempt)
            await run.task(lease)

    play(tmp_path / "lied to", lied_to)


def test_a_refused_record_is_asked_of_another_worker(tmp_path: Path) -> None:
    async def script(run: Played) -> None:
        lease = await run.until_leased("SCORE")
        attempt = instead(await asyncio.to_thread(run.compute, lease), b"\xc0")
        await run.upload(lease, attempt)
        with pytest.raises(RejectedTensor):
            await run.complete(lease, attempt)
        await run.coordinator.release(
            ReleaseArgs(run.worker_id, lease.task_id, lease.fence, "RejectedTensor: told so", False)
        )
        other = await run.hello("another")
        again = await run.lease(worker_id=other)
        assert again.task_id == lease.task_id
        assert again.fence > lease.fence
        run.worker_id = other
        await run.task(again)

    play(tmp_path / "lied to", script)
