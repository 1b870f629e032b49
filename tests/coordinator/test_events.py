from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.events import EVENTS, EventLog, read_events


def test_events_come_back_in_order_over_restarts(tmp_path: Path) -> None:
    for fence in (1, 2):
        log = EventLog(tmp_path)
        log.write("opened")
        log.write("leased", task_id="a", fence=fence)
        log.close()
    found = list(read_events(tmp_path))
    assert [(each["event"], each.get("fence")) for each in found] == [
        ("opened", None),
        ("leased", 1),
        ("opened", None),
        ("leased", 2),
    ]
    assert [each["wall_s"] for each in found] == sorted(each["wall_s"] for each in found)


def test_what_has_not_changed_is_not_said_again(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    for tasks in (1, 1, 2, 2, 1):
        log.write("leasable", tasks=tasks)
    log.close()
    assert [each["tasks"] for each in read_events(tmp_path)] == [1, 2, 1]


def test_a_line_cut_short_spoils_no_other(tmp_path: Path) -> None:
    (tmp_path / EVENTS).write_text('{"wall_s": 1.0, "event": "opened"}\n{"wall_s": 2.0, "ev', encoding="utf-8")
    log = EventLog(tmp_path)
    log.write("joined", worker="x")
    log.close()
    assert [each["event"] for each in read_events(tmp_path)] == ["opened", "joined"]


def test_a_full_log_makes_way_for_a_new_one_and_is_read_with_it(tmp_path: Path) -> None:
    for start in (0, 150):
        log = EventLog(tmp_path, max_bytes=4096, files=4)
        for number in range(start, start + 150):
            log.write("progress", task_id="a", fence=1, steps=number)
        log.close()
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [EVENTS, *(f"{EVENTS}.{number}" for number in (1, 2, 3))]
    assert all((tmp_path / name).stat().st_size <= 4096 for name in files)
    steps = [each["steps"] for each in read_events(tmp_path)]
    assert steps == list(range(300 - len(steps), 300)), "the newest, in order and without a gap"
    assert len(steps) > 130


def test_a_rotation_that_was_cut_short_loses_nothing(tmp_path: Path) -> None:
    """Killed after the files were renamed and before the new one was made."""
    log = EventLog(tmp_path)
    log.write("leasable", tasks=1)
    log.close()
    (tmp_path / EVENTS).rename(tmp_path / f"{EVENTS}.1")
    assert [each["tasks"] for each in read_events(tmp_path)] == [1]
    log = EventLog(tmp_path)
    assert not log.torn
    log.write("leasable", tasks=2)
    log.close()
    assert [each["tasks"] for each in read_events(tmp_path)] == [1, 2]


def test_a_log_that_cannot_be_written_disturbs_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / EVENTS).symlink_to("/dev/full")
    log = EventLog(tmp_path)
    log.write("leasable", tasks=1)
    log.close()
    assert capsys.readouterr() == ("", "")


def test_a_run_without_a_log_has_no_events(tmp_path: Path) -> None:
    assert list(read_events(tmp_path)) == []
