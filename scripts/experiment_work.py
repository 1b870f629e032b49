"""The folder in which the cells of the experiment are kept: one folder a digest, finished steps are not done again.

WORK/<digest>/ holds `config.yaml`, `identity.json`, the run directory `run`, what was written by its commands, and once
they are finished `run.json`, `validation.json`, `test.json` and `cloze.json`, or `no-number.json` where training
diverged; those are written whole or not at all, and one that is damaged counts as not there. Where the schema has got
a key since, a cell is still known by its configuration: as for a run that is resumed, a missing key has its default.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from configs.corpus import FilesSource
from configs.load import NUMERICS_VERSION, InvalidConfig, load_config, to_yaml
from configs.schema import Experiment
from model.store import write_whole
from scripts.experiment_cloze import FoundCloze
from scripts.experiment_cost import TEST
from scripts.experiment_measurement import Measurement
from scripts.experiment_plan import Cell, cell_digest
from scripts.experiment_table import Table

_DIGITS = 16
_RUN = "run"
_NO_NUMBER = "no-number"
CLOZE = "cloze"
Json = dict[str, Any]


class WorkInUse(ValueError):
    """Another process carries out cells in the same folder."""


class Work:
    """The work folder: what is finished of every cell, by digest."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._known: dict[str, Measurement] = {}

    def measurement(self, digest: str) -> Measurement | None:
        """What is known of a run that is finished or came to no number; None while it is neither."""
        if digest not in self._known:
            run = _read(self._file(digest, _RUN))
            none = _read(self._file(digest, _NO_NUMBER)) if run is None else None
            if none is not None:
                self._known[digest] = Measurement({"hardware": none["hardware"]}, {}, none["no_number"])
                return self._known[digest]
            if run is None:
                return None
            found = {split: _read(self._file(digest, split)) for split in ("validation", "test")}
            cloze = _read(self._file(digest, CLOZE))
            self._known[digest] = Measurement(
                run,
                {split: each for split, each in found.items() if each is not None},
                cloze=None if cloze is None else FoundCloze(cloze),
            )
        return self._known[digest]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Raises WorkInUse while another process holds it."""
        self.root.mkdir(parents=True, exist_ok=True)
        with open(self.root / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise WorkInUse(f"another experiment runs in {self.root}; stop it, or take another --work") from None
            yield

    def folder(self, digest: str) -> Path:
        """Of a cell: by its digest, or where its configuration already stands under an earlier one."""
        own = self.root / digest[:_DIGITS]
        return own if own.is_dir() else self._earlier.get(digest, own)

    @cached_property
    def _earlier(self) -> dict[str, Path]:
        """Folders by the digests that their configurations have now."""
        found: dict[str, Path] = {}
        for file in sorted(self.root.glob("*/identity.json")):
            identity = _read(file) or {}
            if identity.get("numerics") == NUMERICS_VERSION:
                with suppress(InvalidConfig):
                    config = load_config(file.with_name("config.yaml"))
                    found[cell_digest(config, str(identity.get("data")))] = file.parent
        return found

    @property
    def reuse(self) -> Path:
        """Where results of tasks are kept that several cells share, such as their base and its shards."""
        return self.root / "tasks"

    def run_dir(self, cell: Cell) -> Path:
        return self.folder(cell.digest) / _RUN

    def prepare(self, cell: Cell) -> Path:
        """The folder of a cell with its configuration; returns the file."""
        folder = self.folder(cell.digest)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "config.yaml", to_yaml(cell.config))
        write_whole(folder / "identity.json", json.dumps({"data": cell.data, "numerics": NUMERICS_VERSION}) + "\n")
        return folder / "config.yaml"

    def left(self, cell: Cell) -> list[str]:
        """The steps of a cell that are not finished, in order: `run`, the splits to evaluate, `cloze`."""
        known = self.measurement(cell.digest)
        asked = [] if cell.cloze is None else [CLOZE]
        if known is None:
            return [_RUN, *cell.splits, *asked]
        left = [split for split in cell.splits if not known.holds(split, cell.routes)]
        answered = known.no_number or cell.cloze is None
        if not answered and known.cloze is not None and cell.cloze is not None:
            answered = known.cloze.answers(cell.cloze, TEST, cell.routes)
        return left if answered else [*left, CLOZE]

    def core_s_left(self, cell: Cell) -> float:
        """What a cell may still take: all of it until it is finished but for its cloze."""
        left = self.left(cell)
        return 0.0 if not left else cell.cloze_s if left == [CLOZE] else cell.core_s

    def begun(self, cell: Cell) -> bool:
        return self.run_dir(cell).is_dir()

    def finished_run(self, cell: Cell, described: Json) -> None:
        """Keep what a finished run has cost; what its workers had cached is not needed any more."""
        self._write(cell.digest, _RUN, described)
        shutil.rmtree(self.run_dir(cell) / "workers", ignore_errors=True)

    def came_to_no_number(self, cell: Cell, sentence: str, hardware: Json) -> None:
        """Keep that the training of a cell diverged on this machine: it is not tried again."""
        self._write(cell.digest, _NO_NUMBER, {"no_number": sentence, "hardware": hardware})
        shutil.rmtree(self.run_dir(cell) / "workers", ignore_errors=True)

    def finished_split(self, cell: Cell, split: str, found: Json) -> None:
        """Keep an evaluation, with the routes that were asked for."""
        self._write(cell.digest, split, {**found, "asked": list(cell.routes)})

    def finished_cloze(self, cell: Cell, found: Json) -> None:
        """Keep a cloze, with what was asked for."""
        assert cell.cloze is not None
        self._write(cell.digest, CLOZE, FoundCloze.kept(found, cell.cloze.asked(TEST, cell.routes)))

    def _file(self, digest: str, name: str) -> Path:
        return self.folder(digest) / f"{name}.json"

    def _write(self, digest: str, name: str, document: Json) -> None:
        write_whole(self._file(digest, name), json.dumps(document, indent=1, ensure_ascii=False) + "\n")
        self._known.pop(digest, None)


def _read(path: Path) -> Json | None:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return document if isinstance(document, dict) else None


def data_digest(table: Table, data: Path | None) -> str:
    """SHA-256 over the files that a table reads from the data folder: names and contents. Raises InvalidConfig.

    Its runs are started in that folder, so that no path of a machine stands in a configuration.
    """
    patterns = _patterns(table.experiment)
    if not patterns:
        return ""
    if data is None:
        raise InvalidConfig(f"table {table.name} reads {', '.join(patterns)}: name their folder with --data")
    hashed = hashlib.sha256()
    for pattern in patterns:
        if Path(pattern).is_absolute():
            raise InvalidConfig(f"table {table.name}: corpus.source.paths holds {pattern!r}; give it from --data on")
        found = sorted(path for path in data.glob(pattern) if path.is_file())
        if not found:
            raise InvalidConfig(f"there is no file {pattern} in {data}, which table {table.name} reads")
        for path in found:
            with open(path, "rb") as file:
                hashed.update(f"{path.relative_to(data)} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return hashed.hexdigest()


def _patterns(experiment: Experiment) -> list[str]:
    source = experiment.corpus.source
    return list(source.paths) if isinstance(source, FilesSource) else []


def environment(root: Path) -> dict[str, str]:
    """For the commands of a cell, which run in the data folder: one thread each, and this checkout's packages."""
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
