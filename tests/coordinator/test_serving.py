"""What a start writes into a run directory, and that a start which is refused writes nothing."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from configs.schema import Config
from coordinator.journal import FORMAT, RunUnusable
from coordinator.serving import write_config
from tests.played_run import config_of


def with_seed(config: Config, seed: int) -> Config:
    return config.model_copy(update={"experiment": config.experiment.model_copy(update={"seed": seed})})


def test_a_start_that_is_refused_changes_nothing_of_an_older_run(tmp_path: Path) -> None:
    """So that the version that made the run still opens it."""
    config, run_dir = config_of(tmp_path), tmp_path / "run"
    run_dir.mkdir(exist_ok=True)
    write_config(config, run_dir)
    with closing(sqlite3.connect(run_dir / "state.db", isolation_level=None)) as connection:
        connection.execute("PRAGMA user_version=1")
        connection.execute("INSERT INTO meta VALUES ('backup', 'a note')")
    for wanted, version, notes in ((with_seed(config, 99), 1, 1), (config, FORMAT, 0)):
        if version == 1:
            with pytest.raises(RunUnusable, match="restore the key"):
                write_config(wanted, run_dir)
        else:
            write_config(wanted, run_dir)
        with closing(sqlite3.connect(run_dir / "state.db")) as connection:
            assert connection.execute("PRAGMA user_version").fetchone() == (version,)
            assert connection.execute("SELECT count(*) FROM meta WHERE key = 'backup'").fetchone() == (notes,)
