from __future__ import annotations

from pathlib import Path

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


def test_a_run_without_a_log_has_no_events(tmp_path: Path) -> None:
    assert list(read_events(tmp_path)) == []
