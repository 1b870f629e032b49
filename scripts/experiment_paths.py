"""The whole comparison of dense models, DiLoCo, flat experts and DiPaCo, through the product itself.

Reads tables (configs/experiments/*.yaml), carries out every cell by `dipaco run` and `dipaco evaluate`, and writes
results.json, results.md and a picture a table from whatever is finished. Given again it goes on: a cell that is
finished, or whose training diverged, is not run again, an interrupted one continues. `--list` shows the cells and what
they cost before anything is started.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configs.load import InvalidConfig  # noqa: E402
from dipaco.curves import MissingExtra  # noqa: E402
from dipaco.ending import DONE, UNFINISHED, WRONG, say_wrong  # noqa: E402
from dipaco.progress import duration  # noqa: E402
from model.store import write_whole  # noqa: E402
from scripts.experiment_cell_run import Hands  # noqa: E402
from scripts.experiment_measurement import describe  # noqa: E402
from scripts.experiment_page import Circumstances, Section, page  # noqa: E402
from scripts.experiment_patience import Patience  # noqa: E402
from scripts.experiment_plan import Cell, TablePlan, merged  # noqa: E402
from scripts.experiment_plots import draw  # noqa: E402
from scripts.experiment_results import (  # noqa: E402
    WouldBeLost,
    check_nothing_is_lost,
    check_tables_are_given,
    is_finished,
    missing,
    result_rows,
)
from scripts.experiment_runner import carry_out  # noqa: E402
from scripts.experiment_table import Table, load_table  # noqa: E402
from scripts.experiment_work import CLOZE, Work, WorkInUse, data_digest  # noqa: E402


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "tables", nargs="+", type=Path, metavar="TABLE.yaml", help="such as configs/experiments/2x2.yaml"
    )
    parser.add_argument("--data", type=Path, help="the folder that corpus.source.paths of the tables are in")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="where the results are written (docs)")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "experiment", help="where the cells are kept")
    parser.add_argument("--workers", type=int, default=2, help="worker processes of a cell (2)")
    parser.add_argument("--at-once", type=int, default=1, help="cells at a time (1)")
    parser.add_argument("--only", action="append", default=[], metavar="ROW", help="this row only; may be repeated")
    parser.add_argument("--budget-s", type=float, help="stop after so many seconds; 0 only writes the results")
    parser.add_argument("--list", action="store_true", help="show the cells and what they cost, and start nothing")
    parser.add_argument("--json", action="store_true", help="print the cells, or the result rows, as one JSON list")
    given = parser.parse_args(words)
    if min(given.workers, given.at_once) < 1:
        parser.error("--workers and --at-once must be at least 1")
    return given


class Experiment:
    """The tables of one call and the folder of their cells."""

    def __init__(self, tables: Sequence[Path], data: Path | None, work: Work, only: Sequence[str]) -> None:
        loaded = [load_table(path) for path in tables]
        _check_one_cloze(loaded)
        names = sorted({row.name for table in loaded for row in table.rows})
        for name in only:
            if name not in names:
                raise InvalidConfig(f"--only {name!r} is no row of these tables; they have {', '.join(names)}")
        self.work, self._only = work, frozenset(only)
        self.plans = [TablePlan(table, data_digest(table, data), work.measurement) for table in loaded]

    def cells(self) -> list[Cell]:
        """Every cell of all tables once, in the order in which they are run."""
        return merged(cell for plan in self.plans for cell in plan.cells(self._only))

    def sections(self) -> list[Section]:
        """What is finished of each table."""
        known = self.work.measurement
        return [Section(plan, result_rows(plan, known), missing(plan, known)) for plan in self.plans]

    def hardware(self) -> list[dict[str, Any]]:
        """The machines that the finished cells ran on, each once."""
        found: dict[str, dict[str, Any]] = {}
        for cell in (cell for plan in self.plans for _, cell in plan.reported() if not cell.provisional):
            known = self.work.measurement(cell.digest)
            if known is not None and is_finished(cell, self.work.measurement):
                found[json.dumps(known.run["hardware"], sort_keys=True)] = known.run["hardware"]
        return list(found.values())


def _check_one_cloze(tables: Sequence[Table]) -> None:
    """Raises InvalidConfig where tables ask for two: they may share cells, of which each has one."""
    asking = [table for table in tables if table.cloze is not None]
    for table in asking:
        if table.cloze != asking[0].cloze:
            raise InvalidConfig(
                f"tables {asking[0].name} and {table.name} ask for another cloze each ({asking[0].cloze} and "
                f"{table.cloze}); give both the same, or one table at a time"
            )


def listed(cells: Sequence[Cell], work: Work) -> list[dict[str, Any]]:
    """The cells as --list shows them."""
    return [
        {
            "rows": list(cell.rows),
            "seed": cell.seed,
            "budget": cell.budget,
            "learning_rate": cell.learning_rate,
            "core_s": round(cell.core_s),
            "core_s_left": round(work.core_s_left(cell)),
            "state": _state(cell, work),
            "digest": cell.digest,
        }
        for cell in cells
    ]


def _state(cell: Cell, work: Work) -> str:
    if cell.provisional:
        return "waits for a choice"
    left = work.left(cell)
    if left == [CLOZE]:
        return "without cloze"
    if not left:
        known = work.measurement(cell.digest)
        return "no number" if known is not None and known.no_number else "finished"
    return "begun" if work.begun(cell) else "open"


def print_list(cells: Sequence[dict[str, Any]]) -> None:
    """The cells as a table, and their sum."""
    for number, cell in enumerate(cells, start=1):
        names = ", ".join(cell["rows"])
        place = f"seed {cell['seed']}, {cell['budget']} budget, lr {cell['learning_rate']:g}"
        print(f"{number:3} {cell['core_s']:7,} core-s  {cell['state']:18}  {names} ({place})")
    total = sum(cell["core_s"] for cell in cells)
    left = sum(cell["core_s_left"] for cell in cells)
    print(
        f"{len(cells)} cells, {total:,} core-s by estimate: {duration(total / 2)} of two cores; "
        f"{duration(left / 2)} of it left"
    )


def write_results(experiment: Experiment, out: Path, circumstances: Circumstances, say: Callable[[str], None]) -> bool:
    """Write all files from the finished cells; False, and nothing written, where there is none. Raises WouldBeLost."""
    sections = experiment.sections()
    rows = [row for section in sections for row in section.rows]
    if not rows:
        say(f"no cell is finished: nothing is written into {out}")
        return False
    check_nothing_is_lost(out / "results.json", experiment.plans, rows)
    out.mkdir(parents=True, exist_ok=True)
    pictured = []
    for section in sections:
        name = f"results-{section.plan.table.name}.png"
        try:
            picture = draw(section) if section.rows else b""
        except MissingExtra as error:
            say(f"results.md is without pictures: {error}")
            picture = b""
        if picture:
            (out / name).write_bytes(picture)
        pictured.append(replace(section, picture=name if picture else ""))
    write_whole(out / "results.json", "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    write_whole(out / "results.md", page(pictured, circumstances))
    left = sum(len(section.missing) for section in sections)
    say(f"{out / 'results.md'} and results.json: {len(rows)} results" + (f"; {left} cells are missing" if left else ""))
    return True


def command_of(given: argparse.Namespace) -> str:
    """The call without what belongs to this machine."""
    tables = [_from_root(path) for path in given.tables]
    data = [] if given.data is None else ["--data", "DATA"]
    hands = ["--workers", str(given.workers), "--at-once", str(given.at_once)]
    only = [word for name in given.only for word in ("--only", name)]
    return " ".join(["python", "scripts/experiment_paths.py", *tables, *data, *hands, *only])


def _from_root(path: Path) -> str:
    resolved = path.resolve()
    return str(resolved.relative_to(ROOT)) if resolved.is_relative_to(ROOT) else path.name


def main(words: Sequence[str] | None = None) -> int:
    given = arguments(words)
    try:
        return _main(given)
    except (InvalidConfig, WorkInUse, WouldBeLost, OSError) as error:
        say_wrong(str(error))
        return WRONG


def _main(given: argparse.Namespace) -> int:
    work = Work(given.work)
    data = None if given.data is None else given.data.resolve()
    experiment = Experiment(given.tables, data, work, given.only)
    if given.list:
        cells = listed(experiment.cells(), work)
        print(json.dumps(cells)) if given.json else print_list(cells)
        return DONE
    check_tables_are_given(given.out / "results.json", [plan.table.name for plan in experiment.plans])
    patience = Patience(given.budget_s)
    patience.listen()
    with work.held():
        hands = Hands(given.workers, given.at_once, data)
        outcome = carry_out(experiment.cells, work, hands, describe, patience, _say)
        circumstances = Circumstances(date.today().isoformat(), command_of(given), experiment.hardware())
        write_results(experiment, given.out, circumstances, _say)
    if given.json:
        print(json.dumps([row for section in experiment.sections() for row in section.rows]))
    if outcome.failed:
        say_wrong(f"{len(outcome.failed)} cells failed; what they said stands above, and the same command tries again")
        return WRONG
    if outcome.stopped or any(cell.provisional or work.left(cell) for cell in experiment.cells()):
        say_wrong("stopped before the end; nothing that was finished is lost, and the same command goes on")
        return UNFINISHED
    return DONE


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
