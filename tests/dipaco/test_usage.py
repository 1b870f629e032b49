from __future__ import annotations

import errno
from pathlib import Path

import pytest

from dipaco import ending
from dipaco.usage import Usage, hardware, read_usage, write_usage


def test_times_add_up_and_the_highest_peak_stays(tmp_path: Path) -> None:
    assert read_usage(tmp_path) == Usage()
    write_usage(tmp_path, read_usage(tmp_path).and_then(wall_s=10.0, peak_bytes=500, workers=2))
    write_usage(tmp_path, read_usage(tmp_path).and_then(wall_s=5.0, peak_bytes=300, workers=3))
    assert read_usage(tmp_path) == Usage(wall_s=15.0, peak_bytes=500, workers=3, starts=2)


def test_a_damaged_file_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "usage.json").write_text("{", encoding="utf-8")
    assert read_usage(tmp_path) == Usage()


def test_hardware_names_the_processor_and_its_cores() -> None:
    found = hardware()
    assert found["processor"]
    assert found["cores"] >= 1


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space") as raised:
        write_usage(tmp_path, Usage())
    told = ending.sentence(raised.value)
    assert told is not None
    assert f"({tmp_path / 'usage.json'}); make room and give the same command again" in told
