"""The `execution` part of a run: none of it changes a bit of the result, all of it may change on resume. Torch-free."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from configs.section import Fraction, PositiveInt, Section


class Execution(Section):
    """How the run is carried out; none of it changes a bit of the result, all of it may change on resume."""

    heartbeat_s: Annotated[float, Field(gt=0)] = 2.0
    lease_s: Annotated[float, Field(gt=0)] = 12.0
    chunk_bytes: Annotated[int, Field(ge=1024, le=3 * 1024 * 1024)] = 1024 * 1024
    cache_bytes: PositiveInt = 20 * 1024**3
    keep_versions: Annotated[int, Field(ge=1)] = 2
    max_attempts: PositiveInt = 3
    # Keep the partial progress of TRAIN tasks, as often as its measured cost allows (at most 5 % of a task's time).
    checkpoints: bool = True
    # Seconds from SIGTERM until a worker must be gone, unless it was started with --grace-s.
    grace_s: Annotated[float, Field(ge=0)] = 10.0
    low_disk_bytes: Annotated[int, Field(ge=0)] = 64 * 1024**2
    require_worker_certificates: bool = False
    log_bytes: Annotated[int, Field(ge=4096)] = 64 * 1024**2
    log_files: Annotated[int, Field(ge=2)] = 8
    quarantine_factor: Annotated[float, Field(gt=1)] | None = 10.0
    audit_share: Fraction = 0.0
    # Workers (names, or those of their certificates) whose ban ends when the coordinator starts.
    unban: list[str] = []

    @model_validator(mode="after")
    def _leases_outlast_heartbeats(self) -> Execution:
        if self.lease_s < 3 * self.heartbeat_s:
            raise ValueError(
                f"execution.lease_s ({self.lease_s:g}) must be at least 3 times heartbeat_s ({self.heartbeat_s:g}), "
                "or a lease ends before its worker is heard of"
            )
        return self
