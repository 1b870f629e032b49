"""The commands as a person types them, on one finished run of configs/tests/tiny.yaml by two worker processes."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import math
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from coordinator.snapshot import RunSnapshot
from dipaco.__main__ import main
from dipaco.ending import Refused
from dipaco.evaluation import evaluate_run
from dipaco.examples import Wish, continuations
from inference.sampling import Sampling
from tests.command_line import ENVIRONMENT, dipaco

Ran = tuple[Path, subprocess.CompletedProcess[str]]
Prepare = Callable[[Path], Path]


@pytest.fixture(scope="module")
def folder(tiny_run: Ran) -> Path:
    folder, done = tiny_run
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "runs" / "tiny" / "report.json").read_text(encoding="utf-8"))
    return report


def answer(*arguments: str, cwd: Path) -> Any:
    """What a command prints with --json, in this process: to load torch takes longer than most commands do."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["dipaco", *arguments, "--json"])
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 0
    return json.loads(printed.getvalue())


def test_a_run_prints_progress_a_table_and_routed_text(tiny_run: Ran) -> None:
    _, done = tiny_run
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for part in ("MB moved", "dipaco sequence", "dense-nesterov", "peak memory of all processes", "report.html"):
        assert part in done.stdout, part
    assert re.search(r"^path [01]\.[01]$", done.stdout, re.MULTILINE)


def test_the_report_has_its_documented_keys(report: dict[str, Any]) -> None:
    routes = {"sequence", "every:16", "likelihood:16", "ensemble:2", "oracle:sequence", "oracle:every:16"}
    for key in ("perplexity", "bits_per_byte"):
        assert set(report[key]) == {"dense", "dense-nesterov", "dipaco"}
        assert set(report[key]["dipaco"]) == routes
    assert set(report["per_domain"]) == {"recipe", "code", "law", "numbers"}
    assert set(report["wire_bytes"]) == {"modules", "outer_gradients", "inner_state", "checkpoints", "other"}
    assert all(count > 0 for what, count in report["wire_bytes"].items() if what != "checkpoints")  # tasks are short
    assert set(report["path_load"]["sequence"]) == {"0.0", "0.1", "1.0", "1.1"}
    assert all(sum(loads.values()) == pytest.approx(1.0) for loads in report["path_load"].values())
    assert report["tokens"]["trained"] > report["tokens"]["evaluated"] > 0
    assert report["wall_s"] > 0
    assert 100 < report["peak_rss_mb"] < 3000
    assert report["workers"] == 2
    for key in ("digest", "config_digest"):
        assert re.fullmatch(r"[0-9a-f]{64}", report[key])
    assert report["perplexity"]["dipaco"]["oracle:sequence"] <= report["perplexity"]["dipaco"]["sequence"]


def test_the_page_is_one_file_that_links_to_nothing(folder: Path) -> None:
    text = (folder / "runs" / "tiny" / "report.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in text
    assert "dipaco oracle:sequence" in text
    assert not re.search(r"(src|href)='(?!data:)", text)


def test_evaluate_reproduces_the_report(folder: Path, report: dict[str, Any]) -> None:
    found = answer("evaluate", "runs/tiny", cwd=folder)
    for key in ("perplexity", "bits_per_byte", "per_domain", "path_load"):
        assert found[key] == report[key], key


def test_evaluate_on_another_grid_finds_the_same_mixture(folder: Path, report: dict[str, Any]) -> None:
    found = answer("evaluate", "runs/tiny", "--route", "ensemble:2", "--route", "likelihood:47", cwd=folder)
    mine, reported = found["perplexity"]["dipaco"], report["perplexity"]["dipaco"]
    assert mine["ensemble:2"] == pytest.approx(reported["ensemble:2"])
    assert mine["likelihood:47"] == pytest.approx(reported["sequence"])  # all that is counted of a sequence of 64
    assert reported["oracle:sequence"] <= reported["ensemble:2"]


def test_evaluate_measures_other_text_by_a_fixed_path(folder: Path, write_documents: Callable[..., None]) -> None:
    write_documents(folder / "few.jsonl", per_kind=2)
    found = answer(
        "evaluate", "runs/tiny", "--data", "few.jsonl", "--route", "path:1.0", "--route", "sequence", cwd=folder
    )
    assert set(found["perplexity"]["dipaco"]) == {"path:1.0", "sequence"}
    assert found["split"] == "few.jsonl"


def test_evaluate_measures_the_split_that_is_asked_for(folder: Path, report: dict[str, Any]) -> None:
    found = answer("evaluate", "runs/tiny", "--split", "validation", "--route", "sequence", cwd=folder)
    assert (found["split"], report["split"]) == ("validation", "test")
    assert found["perplexity"]["dense"] != report["perplexity"]["dense"]
    assert answer("evaluate", "runs/tiny", "--split", "test", cwd=folder)["perplexity"] == report["perplexity"]


def test_run_again_on_a_finished_run_only_reports(folder: Path, report: dict[str, Any]) -> None:
    again = dipaco("run", "tiny.yaml", "--workers", "2", "--json", cwd=folder)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == report


def test_digests_differ_by_what_they_cover(folder: Path, report: dict[str, Any]) -> None:
    weights, everything = answer("digest", "runs/tiny", cwd=folder), answer("digest", "runs/tiny", "--all", cwd=folder)
    assert weights["digest"] == report["digest"] != everything["digest"]


def test_status_of_a_directory(folder: Path) -> None:
    status = answer("status", "runs/tiny", cwd=folder)
    assert status["finished"]
    assert status["phase"] == status["num_phases"] == 2


def test_corpus_of_a_run_and_of_its_configuration(folder: Path) -> None:
    of_run, of_config = answer("corpus", "runs/tiny", cwd=folder), answer("corpus", "tiny.yaml", cwd=folder)
    assert of_run["total"] == of_config["total"]
    assert of_run["total"]["documents"] == 240
    assert {sample["domain"] for sample in of_run["samples"]} <= {"recipe", "code", "law", "numbers"}


def test_route_shows_the_path_of_a_text_and_why(folder: Path) -> None:
    text = "stir the onions in butter with salt and pepper until golden"
    found = answer("route", "runs/tiny", "--text", text, "--every", "16", cwd=folder)
    (written,) = answer("generate", "runs/tiny", "--prompt", text, "--tokens", "1", cwd=folder)
    assert found["path"] == written["paths"][0] == next(iter(found["posterior"]))
    assert sum(found["posterior"].values()) == pytest.approx(1.0)
    assert (found["tokens"], found["prefix_tokens"], len(found["chunks"])) == (len(text), 16, 3)
    assert set(found["why"]["domains"]) <= {"recipe", "code", "law", "numbers"}
    assert len(found["why"]["nearest"]) == len(found["why"]["typical"]) == 3
    (folder / "text.txt").write_text(text, encoding="utf-8")
    of_file = answer("route", "runs/tiny", "--file", "text.txt", "--every", "16", cwd=folder)
    command = [sys.executable, "-m", "dipaco", "route", "runs/tiny", "-", "--every", "16"]
    piped = subprocess.run(command, cwd=folder, env=ENVIRONMENT, input=text, capture_output=True, text=True, check=True)
    assert of_file == found
    assert f"path {found['path']}" in piped.stdout
    assert f"why path {found['path']}" in piped.stdout
    assert piped.stderr == ""


def test_route_tells_how_far_traffic_is_from_training(folder: Path, write_documents: Callable[..., None]) -> None:
    write_documents(folder / "traffic.jsonl", per_kind=3)
    found = answer("route", "runs/tiny", "--data", "traffic.jsonl", "--oracle", cwd=folder)
    evaluated = answer("evaluate", "runs/tiny", "--data", "traffic.jsonl", "--route", "sequence", cwd=folder)
    assert found["documents"] == 12
    assert set(found["load"]) == set(found["training_load"]) == {"0.0", "0.1", "1.0", "1.1"}
    assert found["drift"]["path_load"]["psi"] >= 0
    assert found["oracle"]["tokens"] == evaluated["tokens"]["evaluated"]
    assert math.exp(found["oracle"]["router_loss"]) == pytest.approx(evaluated["perplexity"]["dipaco"]["sequence"])


def test_generate_shows_the_path_and_repeats_with_the_seed(folder: Path) -> None:
    arguments = ("generate", "runs/tiny", "--prompt", "stir the onions", "--tokens", "12", "--seed", "7")
    (first,) = answer(*arguments, cwd=folder)
    assert first["prompt"] == "stir the onions"
    assert first["paths"][0] in {"0.0", "0.1", "1.0", "1.1"}
    snapshot, sampling = RunSnapshot.open(folder / "runs" / "tiny"), Sampling(0.8, 40, seed=7)
    (again,) = continuations(snapshot, ["stir the onions"], Wish(12, sampling))
    assert json.loads(json.dumps(again.as_dict())) == first
    (fixed,) = continuations(snapshot, ["stir the onions"], Wish(12, sampling, path="1.1"))
    assert fixed.paths == ("1.1",)


@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        ("mixture", ["evaluate"]),
        ("base", ["evaluate", "--route", "sequence"]),
        ("mixture", ["generate", "--path", "0.0", "--prompt", "x"]),
        ("base", ["generate"]),
        ("base", ["route", "--text", "x"]),
    ],
)
def test_a_damaged_module_is_never_served(
    folder: Path,
    tmp_path: Path,
    model: str,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / "runs" / "tiny", run, ignore=shutil.ignore_patterns("workers", "logs"))
    module_id, (_, file) = next(iter(RunSnapshot.open(run).modules(model).items()))
    data = bytearray(file.read_bytes())
    data[-4] ^= 1
    file.write_bytes(data)
    monkeypatch.setattr(sys, "argv", ["dipaco", arguments[0], str(run), *arguments[1:]])
    with pytest.raises(SystemExit) as ended:
        main()
    errors = capfd.readouterr().err
    assert ended.value.code == 1
    assert f"dipaco: module {module_id} is damaged: blob {file} holds other bytes" in errors
    assert "put back the file of that name" in errors
    assert len(errors.splitlines()) == 1, errors


def test_text_that_is_too_short_is_told_by_how_much_it_takes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "short.txt").write_text("too short", encoding="utf-8")
    monkeypatch.setattr("dipaco.evaluation.MIN_EVALUATED_TOKENS", 71)
    with pytest.raises(Refused, match="has the 71 tokens that an evaluation needs"):
        evaluate_run(RunSnapshot.open(folder / "runs" / "tiny"), data=folder / "short.txt")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "nowhere.yaml"], "there is no configuration file nowhere.yaml"),
        (["run", "wrong.yaml"], "wrong.yaml: unknown key experiment.modle (value {}); did you mean"),
        (["run", "other.yaml", "--run-dir", "runs/tiny"], "runs/tiny holds a run with another experiment.seed"),
        (["evaluate", "nowhere"], "there is no run directory nowhere"),
        (["evaluate", "runs/tiny", "--route", "best"], "route 'best' is none of sequence, every:W"),
        (["evaluate", "runs/tiny", "--route", "best"], "oracle:every:W (W tokens, N paths), nor path:I.J"),
        (["evaluate", "runs/tiny", "--route", "ensemble:5"], "'ensemble:5' of a topology of 4 paths: N must be 2..4"),
        (["evaluate", "runs/tiny", "--route", "path:9.9"], "there is no path '9.9'"),
        (["evaluate", "runs/tiny", "--data", "nowhere.txt"], "nowhere.txt"),
        (["evaluate", "runs/tiny", "--split", "train"], "split 'train' is none of validation, test"),
        (["evaluate", "runs/tiny", "--split", "test", "--data", "tiny.yaml"], "leave --split out"),
        (["generate", "runs/tiny", "--path", "9.9", "--prompt", "x"], "there is no path '9.9'"),
        (["route", "nowhere", "--text", "x"], "there is no run directory nowhere"),
        (["route", "runs/tiny"], "give one of --text TEXT, --file FILE, --data FILE, or - to read"),
        (["route", "runs/tiny", "--text", "x", "--data", "tiny.yaml"], "give one of --text TEXT, --file FILE"),
        (["route", "runs/tiny", "some", "--text", "x"], "'some' is no input; give a text as --text"),
        (["route", "runs/tiny", "--text", ""], "there is nothing to route: the text is empty"),
        (["route", "runs/tiny", "--file", "nowhere.txt"], "No such file or directory (nowhere.txt)"),
        (["route", "runs/tiny", "--file", "runs/tiny/state.db"], "runs/tiny/state.db is not UTF-8 text (byte"),
        (["route", "runs/tiny", "--data", "nowhere.txt"], "nowhere.txt"),
        (["route", "runs/tiny", "--data", "tiny.yaml", "--every", "4"], "--every is for one text; `dipaco evaluate"),
        (["route", "runs/tiny", "--text", "x", "--oracle"], "--oracle needs --data"),
        (["route", "runs/tiny", "--text", "x", "--version", "best"], "--version is of the paths that --oracle runs"),
        (["route", "runs/tiny", "--data", "tiny.yaml", "--oracle", "--version", "first"], "'first' is none of last,"),
        (["digest", "."], ". is not a run directory"),
        (["status", "127.0.0.1:1"], "nobody answers at 127.0.0.1:1"),
        (["status", "nowhere"], "there is no run directory nowhere"),
        (["certs", "runs/tiny", "--host", "no such host"], "host 'no such host' is neither a DNS name nor"),
        (
            ["coordinator", "tiny.yaml", "--listen", "nowhere", "--run-dir", "runs/x"],
            "address 'nowhere' is not HOST:PORT",
        ),
        (
            ["coordinator", "tiny.yaml", "--listen", "0.0.0.0:0", "--run-dir", "runs/y"],
            "0.0.0.0:0 is reachable from other",
        ),
        (["worker"], "no address of a coordinator: give HOST:PORT, or --join FILE"),
        (["worker", "127.0.0.1:1", "--join", "nowhere.json"], "join file nowhere.json cannot be read"),
    ],
)
def test_a_mistake_is_one_sentence_and_a_code(
    folder: Path,
    arguments: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    tiny = (folder / "tiny.yaml").read_text(encoding="utf-8")
    (folder / "wrong.yaml").write_text(tiny.replace("  seed: 0", "  modle: {}\n  seed: 0"), encoding="utf-8")
    (folder / "other.yaml").write_text(tiny.replace("  seed: 0", "  seed: 1"), encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["dipaco", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    errors = capfd.readouterr().err
    assert ended.value.code == 1
    assert errors.startswith("dipaco: ")
    assert sentence in errors
    assert len(errors.splitlines()) == 1, errors


def test_a_run_directory_of_another_version_is_refused_and_left_alone(folder: Path) -> None:
    strange = folder / "runs" / "strange"
    strange.mkdir()
    with contextlib.closing(sqlite3.connect(strange / "state.db")) as database:
        database.execute("PRAGMA user_version=99")
    done = dipaco("run", "tiny.yaml", "--run-dir", "runs/strange", cwd=folder)
    assert done.returncode == 1
    assert done.stderr.startswith("dipaco: run directory runs/strange has format 99, this version of dipaco reads")
    assert len(done.stderr.splitlines()) == 1
    assert not (strange / "usage.json").exists()


def test_a_run_directory_that_is_in_use_is_refused(folder: Path) -> None:
    with (folder / "runs" / "tiny" / "lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        done = dipaco("coordinator", "tiny.yaml", "--run-dir", "runs/tiny", "--listen", "127.0.0.1:0", cwd=folder)
    assert done.returncode == 1
    assert "runs/tiny is locked by another coordinator" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_run_that_is_stopped_says_how_to_go_on_and_ends_the_same(
    tmp_path: Path, prepare_tiny: Prepare, report: dict[str, Any]
) -> None:
    prepare_tiny(tmp_path)
    command = [sys.executable, "-m", "dipaco", "run", "tiny.yaml", "--workers", "2"]
    running = subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    state = tmp_path / "runs" / "tiny"
    deadline = time.monotonic() + 120
    while '"task_id":"pretrain/TRAIN/0/0"' not in _rows(state):
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = psutil.Process(running.pid).children(recursive=True)
    running.send_signal(signal.SIGTERM)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 3, errors
    assert "`dipaco run tiny.yaml --workers 2` continues where it was" in errors
    assert not [child for child in children if child.is_running()]
    done = dipaco("run", "tiny.yaml", "--workers", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((state / "report.json").read_text(encoding="utf-8"))["digest"] == report["digest"]


def _rows(run_dir: Path) -> str:
    """All rows of a run's journal as text; nothing before it is there."""
    if not (run_dir / "state.db").is_file():
        return ""
    connection = sqlite3.connect(f"file:{run_dir / 'state.db'}?mode=ro", uri=True)
    try:
        return "\n".join(body for (body,) in connection.execute("SELECT body FROM rows"))
    except sqlite3.OperationalError:
        return ""
    finally:
        connection.close()
