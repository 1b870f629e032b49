"""What a worker announces; limits of control groups are read from made-up trees."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from worker.probe import capabilities, fingerprint, free_host_memory_bytes

MEBIBYTE = 1024**2


def group(path: Path, **files: str) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)


def test_the_tightest_group_above_the_process_counts(tmp_path: Path) -> None:
    group(tmp_path / "a", memory__max=str(90 * MEBIBYTE), memory__current=str(10 * MEBIBYTE))
    group(
        tmp_path / "a" / "b",
        memory__max=str(50 * MEBIBYTE),
        memory__current=str(30 * MEBIBYTE),
        memory__stat=f"anon 1\ninactive_file {5 * MEBIBYTE}\n",
    )
    assert free_host_memory_bytes(tmp_path, "/a/b") == 25 * MEBIBYTE
    assert free_host_memory_bytes(tmp_path, "/a") == 80 * MEBIBYTE


def test_version_one_groups_and_groups_without_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=60 * MEBIBYTE))
    group(
        tmp_path / "memory" / "box",
        memory__limit_in_bytes=str(40 * MEBIBYTE),
        memory__usage_in_bytes=str(10 * MEBIBYTE),
        memory__stat=f"total_inactive_file {MEBIBYTE}\n",
    )
    assert free_host_memory_bytes(tmp_path, "/box") == 31 * MEBIBYTE
    group(tmp_path / "free", memory__max="max\n", memory__current="1")
    assert free_host_memory_bytes(tmp_path, "/free") == 60 * MEBIBYTE


def test_an_exhausted_group_leaves_nothing(tmp_path: Path) -> None:
    group(tmp_path, memory__max="100", memory__current="200")
    assert free_host_memory_bytes(tmp_path, "/") == 0


def test_capabilities_can_be_overridden_and_end_with_the_processor() -> None:
    offered = capabilities(threads=3, memory_bytes=123)
    assert offered.memory_bytes == 123
    assert offered.threads == 3
    assert offered.devices[-1] == "cpu"
    assert capabilities(threads=1).memory_bytes > MEBIBYTE


def test_fingerprint_names_torch_and_instruction_set() -> None:
    text = fingerprint("cpu")
    assert torch.__version__ in text
    assert torch.backends.cpu.get_cpu_capability() in text
    assert text == fingerprint("cpu")
