"""The rules of the house: who may import whom, where grpc and torch may stand, which flags the commands have.

Imports are read from the source, so that a late one counts like one at the top of a file.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "configs": set(),
    "protocol": set(),
    "model": {"configs"},
    "corpus": {"configs"},
    "routing": {"configs", "corpus", "model"},
    "coordinator": {"configs", "protocol", "corpus", "model", "routing"},
    "worker": {"configs", "protocol", "corpus", "model", "routing"},
    "inference": {"configs", "protocol", "corpus", "model", "routing"},
    "dipaco": {"configs", "protocol", "corpus", "model", "routing", "coordinator", "worker", "inference"},
}
MAY_USE_GRPC = {"service.py", "server.py", "client.py"}
TORCH_FREE = ["configs", "protocol", "model.topology", "model.layout", "model.inner_state", "corpus"]
TORCH_FREE += [f"routing.{name}" for name in ("agreement", "drift", "frozen", "gating", "load", "neighbours")]
TORCH_FREE += ["routing.positions", "routing.sharding"]
TORCH_FREE += [f"inference.{name}" for name in ("gateway_choice", "gateway_config", "gateway_events")]
TORCH_FREE += [f"dipaco.{name}" for name in ("cloze_items", "cloze_routes", "cloze_score")]
TORCH_FREE += [
    f"coordinator.{name}"
    for name in (
        "state",
        "decisions",
        "machine",
        "leases",
        "ownership",
        "arrivals",
        "claims",
        "verdict",
        "norms",
        "plan",
        "early_stopping",
        "record_checks",
        "stage_steps",
        "journal",
        "status",
        "snapshot",
    )
]
GATEWAY_CORE = ["gateway_choice", "gateway_requests", "gateway_events", "gateway_chat"]
GENERATED = {"dipaco_pb2.py", "dipaco_pb2_grpc.py", "inference_pb2.py", "inference_pb2_grpc.py"}


def sources(package: str) -> list[Path]:
    return sorted(path for path in (REPOSITORY / package).rglob("*.py") if path.name not in GENERATED)


def imported(path: Path) -> Iterator[str]:
    """Dotted names of all modules that a file imports, at its top or late."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_only_what_the_table_allows(package: str) -> None:
    ours = set(MAY_IMPORT)
    assert sources(package), f"{package}/ is empty"
    for path in sources(package):
        roots = {name.partition(".")[0] for name in imported(path)} & ours
        assert roots - {package} <= MAY_IMPORT[package], f"{path.relative_to(REPOSITORY)} imports {roots - {package}}"


@pytest.mark.parametrize("package", sorted(set(MAY_IMPORT) - {"protocol"}))
def test_grpc_stands_only_at_the_edge(package: str) -> None:
    for path in sources(package):
        roots = {name.partition(".")[0] for name in imported(path)}
        uses_grpc = bool(roots & {"grpc", "grpc_health", "grpc_reflection", "google"})
        assert not uses_grpc or path.name in MAY_USE_GRPC, f"{path.relative_to(REPOSITORY)} imports grpc"


def test_nothing_is_unpickled() -> None:
    for package in MAY_IMPORT:
        for path in sources(package):
            roots = {name.partition(".")[0] for name in imported(path)}
            assert not roots & {"pickle", "cloudpickle", "dill", "marshal", "shelve"}, path
            text = path.read_text(encoding="utf-8")
            assert "torch.load(" not in text, f"{path}: weights are read as safetensors"
            assert "allow_pickle=True" not in text, path


def modules_after(statement: str) -> set[str]:
    """Names of the modules that are loaded after a statement in a fresh process."""
    script = f"import sys; sys.argv = ['dipaco']\n{statement}\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    return set(done.stdout.split())


@pytest.mark.parametrize("name", TORCH_FREE)
def test_torch_is_not_loaded_by(name: str) -> None:
    package = REPOSITORY / name.replace(".", "/")
    names = [name]
    if package.is_dir():
        names += [f"{name}.{path.stem}" for path in sources(name) if path.stem != "__init__"]
    loaded = modules_after("\n".join(f"import {each}" for each in names))
    assert "torch" not in loaded


def test_the_state_machine_has_no_socket_file_thread_or_clock() -> None:
    forbidden = {"socket", "threading", "asyncio", "time", "os", "pathlib", "sqlite3", "subprocess", "datetime"}
    for name in (
        "state",
        "decisions",
        "machine",
        "leases",
        "ownership",
        "arrivals",
        "claims",
        "verdict",
        "norms",
        "virtual",
        "plan",
        "early_stopping",
        "stage_steps",
        "router_steps",
        "status",
        "outer",
        "robust",
    ):
        roots = {each.partition(".")[0] for each in imported(REPOSITORY / "coordinator" / f"{name}.py")}
        assert not roots & forbidden, f"coordinator/{name}.py imports {roots & forbidden}"


@pytest.mark.parametrize(
    "name", ["stream", "schedule", "stepper", "batch_forward", "slots", "slot_attention", *GATEWAY_CORE]
)
def test_an_engine_decides_without_socket_thread_or_clock(name: str) -> None:
    forbidden = {"socket", "threading", "asyncio", "time", "os", "pathlib", "subprocess", "datetime"}
    roots = {each.partition(".")[0] for each in imported(REPOSITORY / "inference" / f"{name}.py")}
    assert not roots & forbidden, f"inference/{name}.py imports {roots & forbidden}"


def test_help_loads_nothing_heavy() -> None:
    """It answers at once; how soon is for people to measure on an idle machine (`time dipaco --help`)."""
    loaded = modules_after("from dipaco.__main__ import main\nimport dipaco.commands")
    assert not loaded & {"torch", "numpy", "grpc", "pydantic", "sklearn", "rich", "tokenizers", "matplotlib"}


FLAGS = {
    "run": {"--workers", "--run-dir", "--reuse", "--verify", "--json"},
    "coordinator": {"--run-dir", "--listen", "--insecure", "--verify", "--parent", "--log"},
    "worker": {
        "--join",
        "--cache-dir",
        "--reuse",
        "--threads",
        "--memory-bytes",
        "--grace-s",
        "--name",
        "--insecure",
        "--parent",
        "--log",
    },
    "certs": {
        "--host",
        "--address",
        "--worker",
        "--out",
        "--list",
        "--revoke",
        "--rotate-token",
        "--overlap-s",
        "--json",
    },
    "status": {"--join", "--insecure", "--json"},
    "evaluate": {"--data", "--split", "--route", "--version", "--json"},
    "cloze": {"--split", "--route", "--version", "--items", "--context", "--ending", "--json"},
    "chat": {
        "--tokens",
        "--temperature",
        "--top-k",
        "--top-p",
        "--stop",
        "--seed",
        "--route",
        "--plain",
        "--version",
    },
    "generate": {
        "--prompt",
        "--file",
        "--tokens",
        "--temperature",
        "--top-k",
        "--top-p",
        "--stop",
        "--seed",
        "--every",
        "--path",
        "--route",
        "--version",
        "--json",
    },
    "gateway": {
        "--config",
        "--backend",
        "--partial",
        "--http",
        "--name",
        "--api-key-file",
        "--tls-cert",
        "--tls-key",
        "--insecure",
        "--max-prompt-tokens",
        "--max-tokens",
        "--max-running",
        "--drain-s",
    },
    "serve": {
        "--http",
        "--grpc",
        "--name",
        "--memory",
        "--api-key-file",
        "--tls-cert",
        "--tls-key",
        "--insecure",
        "--max-prompt-tokens",
        "--max-tokens",
        "--max-running",
        "--max-waiting",
        "--drain-s",
        "--version",
    },
    "route": {"--text", "--file", "--data", "--every", "--oracle", "--sample", "--version", "--json"},
    "digest": {"--all", "--json"},
    "export": {"--path", "--all", "--router", "--format", "--version", "--overwrite", "--json"},
    "backup": {"--json"},
    "corpus": {"--samples", "--domain", "--json"},
    "simulate": {
        "--workers",
        "--preempt",
        "--coordinator-mtbf",
        "--network",
        "--seed",
        "--compare",
        "--min-worker-kills",
        "--min-coordinator-kills",
        "--virtual",
        "--run-dir",
        "--json",
    },
}


def test_the_flags_of_the_commands_are_frozen() -> None:
    """A flag is a promise: change this table only on purpose."""
    import typer.main

    from dipaco.commands import app

    group = typer.main.get_command(app)
    commands = group.commands  # type: ignore[attr-defined]
    found = {
        name: {flag for parameter in command.params for flag in parameter.opts if flag.startswith("--")} - {"--help"}
        for name, command in commands.items()
    }
    assert found == FLAGS
    assert all(command.help for command in commands.values())


def tracked() -> list[Path]:
    """All text files that git keeps (or would keep)."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
    )
    return [path for name in listed.stdout.splitlines() if (path := REPOSITORY / name).is_file()]


def test_no_third_party_host_and_no_absolute_path_of_a_machine() -> None:
    hosts = re.compile(r"https?://(?!localhost|127\.0\.0\.1|HOST)[\w.-]+")
    places = re.compile(r"(?<![\w.])/(?:home|root|work|Users|mnt)/\w+")
    for path in tracked():
        text = path.read_text(encoding="utf-8", errors="replace")
        for pattern in (hosts, places):
            found = pattern.search(text)
            assert found is None or path.name == Path(__file__).name, f"{path.relative_to(REPOSITORY)}: {found}"


def test_the_readme_names_every_package() -> None:
    tree = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^([a-z]+)/ ", tree, flags=re.MULTILINE))
    folders = {path.parent.name for path in REPOSITORY.glob("*/__init__.py")}
    assert folders == set(MAY_IMPORT)
    assert named == folders | {"scripts", "docs", "tests"}


def test_the_wheel_ships_the_packages_and_nothing_for_tests() -> None:
    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        build = tomllib.load(file)["tool"]["hatch"]["build"]
    assert set(build["targets"]["wheel"]["packages"]) == set(MAY_IMPORT)
    assert build["exclude"] == ["configs/tests"]


def test_every_module_says_what_it_owns() -> None:
    for package in MAY_IMPORT:
        for path in sources(package):
            assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path}: no docstring"
