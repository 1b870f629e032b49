"""`dipaco gateway` as a person starts it: a run's exported router in front of a real `dipaco serve` of the same run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette", reason="needs the extra `serve`")

from dipaco.gateway import open_artefact
from routing.artefact import RouterArtefact
from tests.command_line import ENVIRONMENT, dipaco

Ran = tuple[Path, subprocess.CompletedProcess[str]]
PROMPTS = ("stir the onions with butter", "def return self value", "whereas the party hereto", "12.5 0.0031 77", "x")


@pytest.fixture(scope="module")
def run_dir(tiny_run: Ran) -> Path:
    folder, done = tiny_run
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "tiny"


@pytest.fixture(scope="module")
def exported(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    done = dipaco("export", str(run_dir), str(out), "--router", cwd=out.parent)
    assert done.returncode == 0, done.stderr
    return out


@contextmanager
def running(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of ours and its address; it is asked to end, and ends with code 0."""
    command = [sys.executable, "-m", "dipaco", *arguments, "--http", "127.0.0.1:0"]
    server = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        lines = [server.stdout.readline() for _ in range(2)]
        assert "http://" in lines[1], server.communicate(timeout=60)
        yield server, lines[1].split()[1]
        server.send_signal(signal.SIGTERM)
        out, err = server.communicate(timeout=60)
    finally:
        server.kill()
    assert (server.returncode, err) == (0, "")
    assert "all requests were answered" in out


def completion(url: str, prompt: str, **changes: Any) -> tuple[dict[str, Any], Any]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 12, "seed": 7, "temperature": 0.8, **changes}
    request = urllib.request.Request(f"{url}/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read()), answer.headers


def test_the_gateway_answers_as_the_server_of_the_whole_mixture_does(run_dir: Path, exported: Path) -> None:
    artefact = RouterArtefact.open(exported / "router")
    with running("serve", str(run_dir)) as (_, url):
        flags = [part for path in artefact.paths for part in ("--backend", f"{path}=tiny/{path}@{url}")]
        with running("gateway", str(exported), *flags) as (_, gateway):
            for prompt in PROMPTS:
                whole, _ = completion(url, prompt)
                routed, headers = completion(gateway, prompt)
                assert routed["choices"][0]["text"] == whole["choices"][0]["text"]
                tokens = np.array([artefact.tokenizer.bos_id, *artefact.tokenizer.encode(prompt)])
                best = artefact.paths[int(artefact.router.route(tokens)[0].argmax())]
                assert headers["x-dipaco-path"] == headers["x-dipaco-first-choice"] == best
                assert {each["path"] for each in routed["choices"][0]["dipaco"]["paths"]} == {best}


def test_a_router_is_found_in_its_folder_in_an_export_and_in_a_run(run_dir: Path, exported: Path) -> None:
    opened = [open_artefact(place) for place in (exported / "router", exported, run_dir)]
    assert [name for _, name in opened] == ["tiny"] * 3
    assert len({(artefact.paths, artefact.router.version) for artefact, _ in opened}) == 1
    tokens = np.array([opened[0][0].tokenizer.bos_id, *opened[0][0].tokenizer.encode(PROMPTS[0])])
    assert len({artefact.router.route(tokens)[0].tobytes() for artefact, _ in opened}) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "no path has a backend"),
        (("--backend", "9.9=m@http://127.0.0.1:1/v1"), "backend '9.9' is of no path of the router"),
        (("--backend", "0.0=m@http://127.0.0.1:1/v1"), "path 0.1 has no backend"),
        (("--config", "none.yaml"), "there is no configuration file none.yaml"),
        (("--http", "0.0.0.0:0", "--backend", "0.0=m@http://127.0.0.1:1/v1"), "no API key is asked for"),
        (("--partial", "--name", "a/b", "--backend", "0.0=m@http://127.0.0.1:1/v1"), "cannot be a model's"),
    ],
)
def test_mistakes_end_it_with_one_sentence(exported: Path, arguments: tuple[str, ...], sentence: str) -> None:
    done = dipaco("gateway", str(exported), *arguments, cwd=exported)
    assert done.returncode == 1
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_place_without_a_router_is_refused(tmp_path: Path) -> None:
    done = dipaco("gateway", str(tmp_path), "--backend", "0.0=m@http://127.0.0.1:1/v1", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "is no router (router.json), no export (export.json) and no run (config.yaml)" in done.stderr
