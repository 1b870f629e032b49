"""What this machine can do for a run: devices, memory that is free for a task, and the class of its arithmetic.

Memory respects cgroup limits (containers) beside what the system reports. torch is imported late.
"""

from __future__ import annotations

import os
import platform
import socket
from pathlib import Path
from typing import Literal

import psutil

from protocol.tasks import Capabilities

Device = Literal["cpu", "cuda", "mps"]

_CGROUP = Path("/sys/fs/cgroup")
# Versions 2 and 1 of control groups: limit, current use, and the name of the cache that gives way, in `memory.stat`.
_CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def capabilities(threads: int, memory_bytes: int | None = None) -> Capabilities:
    """What a worker with this many threads announces; `memory_bytes` overrides the probe."""
    found = devices()
    return Capabilities(
        devices=found,
        memory_bytes=free_memory_bytes(found[0]) if memory_bytes is None else memory_bytes,
        threads=threads,
        fingerprint=fingerprint(found[0]),
        pid=os.getpid(),
        host=socket.gethostname(),
    )


def devices() -> list[Device]:
    """The devices torch can use here, best first."""
    import torch

    found: list[Device] = []
    if torch.cuda.is_available():
        found.append("cuda")
    if torch.backends.mps.is_available():
        found.append("mps")
    return [*found, "cpu"]


def free_memory_bytes(device: Device) -> int:
    """Free memory of the device a task would run on; for cpu and mps, of the machine or the container."""
    if device == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info()
        return int(free)
    return free_host_memory_bytes()


def free_host_memory_bytes(root: Path = _CGROUP, group: str | None = None) -> int:
    """Available RAM, or what the tightest control group above this process leaves where that is less."""
    available = int(psutil.virtual_memory().available)
    directories = _group_directories(root, _own_group() if group is None else group)
    left = [_left_in_group(directory) for directory in directories]
    return max(0, min([available, *(bytes_left for bytes_left in left if bytes_left is not None)]))


def fingerprint(device: Device) -> str:
    """Workers with equal fingerprints compute equal bits: torch version, device model, instruction set."""
    import torch

    parts = [f"torch {torch.__version__}"]
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        parts += [torch.cuda.get_device_name(), f"sm_{major}{minor}", f"cuda {torch.version.cuda}"]
    parts += [_processor(), torch.backends.cpu.get_cpu_capability()]
    return "; ".join(parts)


def _own_group() -> str:
    """The path of this process's control group below the mount; the root where there is none."""
    for line in _lines(Path("/proc/self/cgroup")):
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            return path
    return "/"


def _group_directories(root: Path, group: str) -> list[Path]:
    """The control group and all groups above it, in the layouts of versions 2 and 1."""
    relative = Path(group.lstrip("/"))
    names = [relative, *relative.parents]
    return [base / name for base in (root, root / "memory") for name in names]


def _left_in_group(directory: Path) -> int | None:
    """Bytes the group may still take, counting file cache that gives way as free; None without a limit."""
    for limit_name, used_name, cache_name in _CGROUP_FILES:
        limit, used = _number(directory / limit_name), _number(directory / used_name)
        if limit is not None and used is not None:
            return limit - used + _statistic(directory / "memory.stat", cache_name)
    return None


def _number(path: Path) -> int | None:
    """The number in a file, or None where it is missing, closed to us, or says `max` for no limit."""
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].strip().isdecimal() else None


def _statistic(path: Path, name: str) -> int:
    values = [int(line.split()[1]) for line in _lines(path) if line.startswith(f"{name} ")]
    return values[0] if values else 0


def _lines(path: Path) -> list[str]:
    """The lines of a file, none where it cannot be read."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _processor() -> str:
    """The model of the processor, as the system names it."""
    names = [line.partition(":")[2].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
