"""`dipaco serve` on a finished run and on one that still trains, and the soak; generation that streams."""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette", reason="needs the extra `serve`")

from coordinator.plan import MIXTURE, Plan, blob
from coordinator.snapshot import RunSnapshot
from corpus.token_file import TokenFile
from dipaco.ending import Refused
from dipaco.examples import Desk, Wish, continuations
from dipaco.followed_run import complete_paths, followed
from dipaco.serving import Offer, Signals, serve_until
from dipaco.sizes import BadSize, parse_bytes
from inference.engine import Request
from inference.sampling import Sampling
from inference.server import Doors, OpenDoors
from model.topology import UnknownPath
from protocol.tasks import FeaturizeSpec
from routing.records import Routes
from scripts.soak_server import soak
from tests.command_line import ENVIRONMENT
from tests.played_run import config_of, played
from worker.outcome import no_progress
from worker.task import run_task

Ran = tuple[Path, subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def run_dir(tiny_run: Ran) -> Path:
    folder, done = tiny_run
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "tiny"


def completion(address: object, prompt: str, **changes: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 12, "seed": 7, "temperature": 0.8, **changes}
    request = urllib.request.Request(f"http://{address}/v1/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: dict[str, Any] = json.loads(answer.read())
        return found


def test_serve_answers_as_generate_does_and_drains_at_sigterm(run_dir: Path) -> None:
    command = [sys.executable, "-m", "dipaco", "serve", str(run_dir), "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"]
    server = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        lines = [server.stdout.readline() for _ in range(3)]
        address = lines[1].split("http://")[1].removesuffix("/v1\n")
        snapshot = RunSnapshot.open(run_dir)
        wish = Wish(12, Sampling(0.8, seed=7)).routed("every:4")
        (alone,) = continuations(snapshot, ["stir the onions"], wish)
        answer = completion(address, "stir the onions", route="every:4")
        assert answer["choices"][0]["text"] == alone.text
        assert [each["path"] for each in answer["choices"][0]["dipaco"]["paths"]] == list(alone.paths)
        assert "gRPC" in lines[2]
        server.send_signal(signal.SIGTERM)
        out, err = server.communicate(timeout=60)
    finally:
        server.kill()
    assert server.returncode == 0
    assert "all requests were answered" in out
    assert err == ""


def test_the_path_of_a_text_is_that_of_evaluation(run_dir: Path) -> None:
    """The prefix of every held-out sequence, as a prompt: the path that generates is the one that evaluation took."""
    snapshot = RunSnapshot.open(run_dir)
    tokens, routes = _evaluated(snapshot)
    desk = Desk.open(snapshot, Wish(1, Sampling(0.0)))
    assert len(tokens) > 10
    for sequence, path_index in zip(tokens[:20], routes.tolist(), strict=False):
        request = Request([int(token) for token in sequence[1:40]], 1, Sampling(0.0))
        (first,) = desk.engine.generate(request)
        assert first.path_index == path_index


def _evaluated(snapshot: RunSnapshot) -> tuple[list[Any], Any]:
    """Sequences of the test split, and the path that the evaluate stage's routing gave each."""
    plan, state = snapshot.plan, snapshot.state
    part = next(part for part in plan.ranges(state, "test") if part["sequences"])
    router, base = plan.router(state), plan.base_path(state)
    assert router is not None
    spec = FeaturizeSpec(
        mode="route",
        base=base,
        tokens=blob(part["file"]),
        prefix_tokens=snapshot.config.experiment.sharding.prefix_tokens,
        numerics=plan.numerics,
        router=router,
        intervals=[],
        max_sequences=None,
    )
    refs = [*(module.blob for module in base.modules), router, spec.tokens]
    files = {ref.digest: snapshot.store.path(ref.digest) for ref in refs}
    with tempfile.TemporaryDirectory() as scratch:
        outcome = run_task(spec, snapshot.config.experiment, files, Path(scratch), no_progress)
        routes = Routes.from_bytes(outcome.files["routes"].read_bytes())
    with TokenFile.open(snapshot.store.path(spec.tokens.digest)) as file:
        return [np.array(file.tokens(position)) for position in routes.positions.tolist()], routes.sequence


@pytest.mark.parametrize(("text", "expected"), [("2GiB", 2 * 1024**3), ("1.5 mb", 1_500_000), ("77", 77)])
def test_sizes(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected
    for wrong in ("much", "4k", "0", "-1GB"):
        with pytest.raises(BadSize, match="write one like 2GiB"):
            parse_bytes(wrong)


def test_a_soak_loses_nothing(run_dir: Path) -> None:
    found = soak(run_dir, requests=100, clients=8, tokens=8, seed=1, arguments=["--max-waiting", "6"])
    assert found["failures"] == []
    assert {"answered", "left", "refused"} <= set(found["outcomes"])
    assert sum(found["outcomes"].values()) == 100
    assert found["compared"] > 40


@pytest.mark.slow
def test_a_long_soak_loses_nothing(run_dir: Path) -> None:
    found = soak(run_dir, requests=1000, clients=32, tokens=32, seed=2, arguments=[])
    assert found["failures"] == []
    assert sum(found["outcomes"].values()) == 1000


def test_a_path_is_served_at_the_last_phase_that_all_its_modules_stepped(tmp_path: Path) -> None:
    """While a run trains, a module is a step ahead of another of the same path: its version before is the one."""

    async def train() -> tuple[int, int]:
        checked = ahead = 0
        config = config_of(tmp_path, keep_versions=2)
        async with played(config, tmp_path / "run") as run:
            while not (lease := await run.lease()).finished:
                await run.task(lease)
                state = RunSnapshot.open(tmp_path / "run").state
                if not state.modules_of(MIXTURE):
                    continue
                plan = Plan(config)
                for path_index, digests in enumerate(complete_paths(plan, state, MIXTURE)):
                    assert digests is not None
                    rows = [state.modules[f"{MIXTURE}/{each}"] for each in plan.mixture.modules_of_path(path_index)]
                    phase = min(row.version for row in rows)
                    for row, digest in zip(rows, digests, strict=True):
                        versions = [row.params.digest, *(ref.digest for ref in row.history)]
                        assert versions.index(digest) == row.version - phase
                        ahead += row.version > phase
                    checked += 1
        return checked, ahead

    checked, ahead = asyncio.run(train())
    assert checked > 0
    assert ahead > 0, "no module was ever ahead: the test sees nothing"


def test_a_run_that_still_trains_is_followed(tmp_path: Path) -> None:
    """A server opened in the middle: its answers are of newer snapshots as they come, and old files go again."""

    async def train_and_serve() -> tuple[set[str], int]:
        run_dir = tmp_path / "run"
        opened: list[OpenDoors] = []
        said: list[str] = []
        signals, snapshots = Signals(), set()
        async with played(config_of(tmp_path, keep_versions=2), run_dir) as run:
            while True:
                lease = await run.lease()
                if lease.task_id.startswith("train/TRAIN"):
                    break
                await run.task(lease)
            serving = asyncio.create_task(
                serve_until(
                    signals,
                    run_dir,
                    Doors("127.0.0.1:0"),
                    Offer(name="tiny", look_s=0.01),
                    said.append,
                    ready=opened.append,
                )
            )
            await run.until(lambda: opened or serving.done())
            first = await asyncio.to_thread(completion, opened[0].http, "stir")
            snapshots.add(first["system_fingerprint"])
            await run.task(lease)
            while not (lease := await run.lease()).finished:
                await run.task(lease)
            newest = await asyncio.to_thread(_newest, run_dir)
            await run.until(lambda: any(newest in line for line in said))
            last = await asyncio.to_thread(completion, opened[0].http, "stir")
            snapshots.add(last["system_fingerprint"])
            assert last["system_fingerprint"] == newest
            signals.hear()
            assert await serving
        return snapshots, len(list((run_dir / "pins").iterdir()))

    snapshots, pins = asyncio.run(train_and_serve())
    assert len(snapshots) == 2
    assert pins == 0


def _newest(run_dir: Path) -> str:
    with followed(run_dir, say=lambda line: None) as run:
        taken = run.take()
        assert taken is not None
        return taken.name


def test_files_of_a_snapshot_stay_as_long_as_its_paths(run_dir: Path) -> None:
    with followed(run_dir) as run:
        taken = run.take()
        assert taken is not None
        assert run.take() is None
        held = set(run._store.digests())
        assert held == {digest for path in range(4) for digest in taken.paths.modules(path)[0]}
        del taken
        gc.collect()
        run.take()
        assert not set(run._store.digests())


@pytest.mark.parametrize(
    ("route", "error", "sentence"),
    [
        ("oracle:sequence", Refused, "is for measuring"),
        ("path:9.9", UnknownPath, "there is no path '9.9'"),
        ("ensemble:9", ValueError, "N must be 2..4"),
    ],
)
def test_routes_that_no_text_takes(run_dir: Path, route: str, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        Desk.open(RunSnapshot.open(run_dir), Wish(1, Sampling()).routed(route))


def test_a_text_streams_with_its_paths_and_its_speed(run_dir: Path) -> None:
    snapshot, now = RunSnapshot.open(run_dir), time.monotonic()
    wish = Wish(24, Sampling(0.8, seed=3)).routed("every:4")
    desk = Desk.open(snapshot, wish)
    writing = desk.write("return self", wish)
    strokes = list(writing)
    assert "".join(stroke.text for stroke in strokes) == writing.text
    assert [strokes[0].path, *(stroke.path for stroke in strokes if stroke.switched)] == writing.paths
    assert 0 < writing.first_token_s <= writing.end_s <= time.monotonic() - now
    assert f"{writing.tokens} tokens, the first after" in writing.speed()
    stopped = desk.write("return self", replace(wish, stop=(writing.text[5],)))
    assert list(stopped)
    assert stopped.text == writing.text[: writing.text.index(writing.text[5])]
    assert stopped.finish == "stop"
