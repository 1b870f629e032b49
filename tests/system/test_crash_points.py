"""Kill -9 at a few of the durable effects of a small run; scripts/crash_points.py tries them all."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.crash_points import Coordinators, CrashPoints, CrashRunFailed, Point, check_same_run, earlier_results

SAMPLE = 6


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CrashPoints]:
    coordinators = Coordinators()
    crash_points = CrashPoints(tmp_path_factory.mktemp("crash-points"), coordinators)
    crash_points.record()
    yield crash_points
    coordinators.close()


def test_every_kind_of_effect_is_counted(recorded: CrashPoints) -> None:
    kinds = {effect.split()[0] for effect in recorded.effects}
    assert kinds == {"fsync", "rename", "remove", "sqlite"}
    assert len(recorded.effects) > 200


def test_bytes_are_on_the_disk_before_their_name_is(recorded: CrashPoints) -> None:
    assert [effect for effect in recorded.effects if effect.endswith("UNSYNCED")] == []


@pytest.mark.parametrize("part", range(SAMPLE))
def test_a_kill_changes_no_bit(part: int, recorded: CrashPoints) -> None:
    """One point in each part of the run, before and after an effect in turn."""
    number = len(recorded.effects) * (2 * part + 1) // (2 * SAMPLE)
    outcome = recorded.kill_at(Point(number, "after" if part % 2 else "before"))
    assert outcome.effect, "the run ended before it came to that effect"
    assert (outcome.digest, outcome.error) == (recorded.digest, "")


def test_a_kill_in_a_reshard_changes_no_bit(tmp_path: Path) -> None:
    """Before, amidst and after what the coordinator itself stores on the way to new shards."""
    coordinators = Coordinators()
    try:
        crash_points = CrashPoints(tmp_path, coordinators, reshard=True)
        crash_points.record()
        effects = enumerate(crash_points.effects, start=1)
        own = [number for number, effect in effects if re.match("rename RUN/blobs/scratch/[^/]*/blob", effect)]
        for number in own[-4:-1]:  # what is to be scored, the gater, the first new shard
            outcome = crash_points.kill_at(Point(number, "before"))
            assert (outcome.digest, outcome.error) == (crash_points.digest, "")
    finally:
        coordinators.close()


def test_outputs_between_store_and_transaction_are_not_done_again(recorded: CrashPoints) -> None:
    """Killed at the very transaction that makes a task count: the worker asks for it again, and computes nothing."""
    commits = [number for number, effect in enumerate(recorded.effects, start=1) if effect == "sqlite COMMIT"]
    trained = [number for number in commits if recorded.effects[number - 2].startswith("fsync RUN/blobs")]
    outcome = recorded.kill_at(Point(trained[len(trained) // 2], "before"))
    assert (outcome.digest, outcome.error, outcome.leased_again) == (recorded.digest, "", 0)


def test_an_interrupted_call_goes_on_where_it_was(tmp_path: Path) -> None:
    """What was found counts; what was being written, and what came to no digest, is tried again."""
    lines = [
        json.dumps({"number": number, "when": "before", "digest": "d", "error": error})
        for number, error in ((1, ""), (2, "the machine was busy"), (3, "the machine was busy"), (3, ""))
    ]
    (tmp_path / "results.jsonl").write_text("\n".join(lines) + '\n{"number": 4, "wh', encoding="utf-8")
    assert set(earlier_results(tmp_path / "results.jsonl")) == {Point(1, "before"), Point(3, "before")}
    assert earlier_results(tmp_path / "none") == {}


def test_results_of_another_version_are_not_mixed_in(tmp_path: Path) -> None:
    for _ in range(2):
        check_same_run(tmp_path, "digest")
    with pytest.raises(CrashRunFailed, match="other bits"):
        check_same_run(tmp_path, "another")
