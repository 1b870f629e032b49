"""`dipaco export` on a small finished run: what it writes, what it refuses, and that it answers without the run."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from coordinator.plan import MIXTURE
from coordinator.snapshot import RunSnapshot
from corpus.token_file import TokenFile
from corpus.tokenizer import Tokenizer
from dipaco.__main__ import main
from dipaco.ending import Refused
from dipaco.examples import Wish, continuations
from dipaco.export import ExportWish, export
from dipaco.export_card import shards_of
from dipaco.exported import is_exported, opened
from inference.module_cache import DamagedModule
from inference.sampling import Sampling
from model import tensor_file
from model.store import file_digest
from routing.artefact import BadArtefact, RouterArtefact
from routing.router import FeatureRouter
from tests.played_run import config_of, played

GREEDY = Wish(12, Sampling(0.0, None, seed=0))
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exporting")

    async def play() -> None:
        async with played(config_of(folder), folder / "run") as run:
            while not (lease := await run.lease()).finished:
                if lease.spec is not None:
                    await run.task(lease)

    asyncio.run(play())
    return folder / "run"


@pytest.fixture(scope="module")
def snapshot(run: Path) -> RunSnapshot:
    return RunSnapshot.open(run)


@pytest.fixture(scope="module")
def prompts(snapshot: RunSnapshot) -> list[str]:
    """A text for each path, in their order: how a sequence of its shard begins."""
    tokenizer, found = Tokenizer.from_file(snapshot.tokenizer_path), []
    for shard in snapshot.state.shards_of(MIXTURE):
        with TokenFile.open(snapshot.store.path(shard.files[0].digest)) as file:
            found.append(tokenizer.decode(file.tokens(0)[1:25].tolist()))
    return found


@pytest.fixture(scope="module")
def everything(snapshot: RunSnapshot, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All paths and the router."""
    out = tmp_path_factory.mktemp("exported") / "all"
    export(snapshot, ExportWish(all_paths=True, router=True), out)
    return out


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs a command line in this process: its exit code, what it printed, and what it complained of."""

    def carry_out(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dipaco", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capfd.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return carry_out


def test_one_path_is_a_checkpoint_of_its_modules(snapshot: RunSnapshot, tmp_path: Path) -> None:
    made = export(snapshot, ExportWish(path="1"), tmp_path / "out")
    names = {"README.md", "config.json", "export.json", "generation_config.json", "model.safetensors"}
    names |= {"special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    tensors = tensor_file.read(tmp_path / "out" / "model.safetensors")
    modules = {module.module_id: module.blob.digest for module in snapshot.paths()[1].modules}
    assert {each["module"]: each["sha256"] for each in made["paths"]["1"]["modules"]} == modules
    expected: dict[str, np.ndarray] = {}
    for digest in modules.values():
        expected |= tensor_file.read(snapshot.store.path(digest))
    assert tensors.keys() == expected.keys()
    assert all(np.array_equal(tensors[name], expected[name]) for name in tensors)


def test_modules_that_paths_share_are_stored_once(snapshot: RunSnapshot, everything: Path) -> None:
    first, second = everything / "path-0", everything / "path-1"
    assert os.path.samefile(first / "module-1.0.safetensors", second / "module-1.0.safetensors")
    for path_index, folder in enumerate((first, second)):
        weight_map = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
        for module in snapshot.paths()[path_index].modules:
            file = folder / f"module-{module.module_id}.safetensors"
            assert file_digest(file)[0] == module.blob.digest
            assert not os.path.samefile(file, snapshot.store.path(module.blob.digest))
            for name in tensor_file.shapes(file):
                assert weight_map.pop(name) == file.name
        assert not weight_map


def test_without_hard_links_every_path_has_its_own_copy(
    snapshot: RunSnapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("dipaco.export.os.link", no_links)
    export(snapshot, ExportWish(all_paths=True), tmp_path / "out")
    first, second = (tmp_path / "out" / f"path-{path}" / "module-1.0.safetensors" for path in (0, 1))
    assert not os.path.samefile(first, second)
    assert first.read_bytes() == second.read_bytes()


def test_the_exported_mixture_writes_what_the_run_writes(
    snapshot: RunSnapshot, everything: Path, prompts: list[str]
) -> None:
    expected = [each.as_dict() for each in continuations(snapshot, prompts, GREEDY)]
    assert [each["paths"] for each in expected] == [("0",), ("1",)]
    with opened(everything) as mixture:
        assert [each.as_dict() for each in mixture.continuations(prompts, GREEDY)] == expected
        fixed = [each.paths for each in mixture.continuations(prompts, replace(GREEDY, path="1"))]
    assert fixed == [("1",)] * 2


def test_the_router_artefact_is_the_router_of_the_run(
    snapshot: RunSnapshot, everything: Path, prompts: list[str]
) -> None:
    from dipaco.run_router import open_router

    artefact, opened_router = RouterArtefact.open(everything / "router"), open_router(snapshot)
    of_run = FeatureRouter(opened_router.base, opened_router.frozen)
    assert (artefact.paths, artefact.router.version) == (("0", "1"), of_run.version)
    assert set(artefact.domains["0"]) <= {"onion", "return", "licensee"}
    tokenizer = Tokenizer.from_file(snapshot.tokenizer_path)
    for prompt in prompts:
        tokens = np.array([tokenizer.bos_id, *tokenizer.encode(prompt)])
        assert tokens[1:].tolist() == artefact.tokenizer.encode(prompt)
        assert artefact.router.route(tokens)[0].tolist() == of_run.route(tokens)[0].tolist()


def test_a_path_with_its_router_says_what_belongs_elsewhere(
    run: Path, tmp_path: Path, command: Command, prompts: list[str]
) -> None:
    out = str(tmp_path / "out")
    assert command("export", str(run), out, "--path", "0", "--router")[0] == 0
    code, printed, complaints = command("generate", out, "--prompt", prompts[1], "--tokens", "4", "--json")
    assert code == 0
    assert json.loads(printed)[0]["paths"] == ["0"]
    assert "the router names path 1, which this folder does not hold" in complaints


@pytest.mark.parametrize(
    ("sharding", "stages", "sentence"),
    [
        ("kmeans", ["shard"], "the sequences that a router gave to it, which is the router of the run"),
        ("random", ["shard"], "drawn at random, whatever their domain: this is not where new text goes"),
        ("random", ["shard", "reshard"], "a router gave to it, which is the router of the run"),
        (
            "kmeans",
            ["shard", "gater"],
            "a router gave to it. The run's router is a gater that was fitted to the trained",
        ),
        ("random", ["shard", "gater"], "drawn at random, whatever their domain. The run's router is a gater"),
    ],
)
def test_the_card_says_why_paths_were_trained_on_what_they_were(
    sharding: str, stages: list[str], sentence: str
) -> None:
    done = {f"{kind}-{place}": SimpleNamespace(kind=kind, status="done") for place, kind in enumerate(stages)}
    done["later"] = SimpleNamespace(kind="gater", status="waiting")
    config = SimpleNamespace(experiment=SimpleNamespace(sharding=SimpleNamespace(kind=sharding)))
    snapshot: Any = SimpleNamespace(state=SimpleNamespace(stages=done), config=config)
    assert sentence in shards_of(snapshot)


def test_the_card_says_which_text_goes_where(everything: Path) -> None:
    text = (everything / "README.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith(("| 0 |", "| 1 |"))]
    assert len(rows) == 2
    assert "the sequences that a router gave to it" in text
    assert all("%" in row and ("onion" in row or "return" in row or "licensee" in row) for row in rows)
    for part in ("base model", "AutoModelForCausalLM", "hard link", "RouterArtefact", "dipaco generate FOLDER"):
        assert part in text, part


def test_gguf_files_come_with_a_modelfile(snapshot: RunSnapshot, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    export(snapshot, ExportWish(all_paths=True, file_format="gguf"), tmp_path / "out")
    for path in ("0", "1"):
        folder = tmp_path / "out" / f"path-{path}"
        modelfile = (folder / "Modelfile").read_text(encoding="utf-8")
        assert f"FROM ./path-{path}.gguf" in modelfile
        assert "PARAMETER num_ctx 64" in modelfile
        reader = gguf.GGUFReader(folder / f"path-{path}.gguf")
        assert reader.fields["general.name"].contents() == f"crash-points {path}"
    with pytest.raises(Refused, match="holds GGUF files"), opened(tmp_path / "out"):
        pass


def test_damaged_weights_are_neither_exported_nor_answered_with(run: Path, everything: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    damaged = RunSnapshot.open(copy)
    spoil(damaged.store.path(damaged.paths()[0].modules[0].blob.digest))
    with pytest.raises(DamagedModule, match=r"module 0\.0 is damaged"):
        export(damaged, ExportWish(all_paths=True), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    shutil.copytree(everything, tmp_path / "all")
    spoil(tmp_path / "all" / "path-0" / "module-0.0.safetensors")
    changed = pytest.raises(Refused, match=r"weights in .* are not those that its export\.json names")
    with changed, opened(tmp_path / "all") as mixture:
        list(mixture.continuations(["onion"], replace(GREEDY, path="0")))
    spoil(tmp_path / "all" / "router" / "router.msgpack")
    with pytest.raises(BadArtefact, match=r"router\.msgpack is not the file that router\.json was written with"):
        RouterArtefact.open(tmp_path / "all" / "router")


def spoil(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-4] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "there is nothing to export; give --path I.J, --all or --router"),
        (["--path", "0", "--all"], "--path names one path and --all means every one"),
        (["--path", "7"], "there is no path '7'; paths run from 0 to 1"),
        (["--all", "--format", "onnx"], "format 'onnx' is none of hf, gguf"),
        (["--all", "--version", "first"], "version 'first' is none of last, best"),
        (["--all", "--version", "best"], "keeps no best versions: its experiment.early_stopping is not set"),
    ],
)
def test_a_mistake_is_one_sentence(
    run: Path, tmp_path: Path, command: Command, arguments: list[str], sentence: str
) -> None:
    code, printed, complaints = command("export", str(run), str(tmp_path / "out"), *arguments)
    assert (code, printed) == (1, "")
    assert sentence in complaints
    assert len([line for line in complaints.splitlines() if line.strip()]) == 1, complaints
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_gguf_cannot_express_is_refused(
    run: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    description = json.loads(Tokenizer.from_file(RunSnapshot.open(run).tokenizer_path).to_bytes())
    description["normalizer"] = {"type": "Lowercase"}
    other = Tokenizer.from_bytes(json.dumps(description).encode())
    monkeypatch.setattr("dipaco.export.Tokenizer.from_file", lambda path: other)
    code, _, complaints = command("export", str(run), str(tmp_path / "out"), "--path", "0", "--format", "gguf")
    assert code == 1
    assert "GGUF cannot express the tokenizer of this run: its text is changed by a normalizer" in complaints
    assert not (tmp_path / "out").exists()


def test_json_tells_what_was_made(run: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "out"
    code, printed, _ = command("export", str(run), str(out), "--all", "--json")
    found = json.loads(printed)
    assert code == 0
    assert found["out"] == str(out)
    assert set(found["paths"]) == {"0", "1"}
    assert found["bytes"] == sum({path.stat().st_ino: path.stat().st_size for path in out.rglob("*.*")}.values())
    assert is_exported(out)
    assert not is_exported(out / "path-0")
