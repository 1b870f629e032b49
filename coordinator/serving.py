"""Serving a run: its directory locked, its configuration stored, the coordinator behind a gRPC server until the end."""

from __future__ import annotations

import asyncio
import datetime
import json
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs.load import NUMERICS_VERSION, resume_difference, to_yaml
from configs.schema import Config
from coordinator.allocator import give_back_large_buffers
from coordinator.coordinator import Coordinator
from coordinator.events import EventLog
from coordinator.journal import UNFINISHED_BACKUP, Journal, RunLock, RunUnusable
from coordinator.recording import Recording
from coordinator.server import check_listen, start_server
from model.store import BlobStore
from protocol.expiry import check_server
from protocol.security import load_security


class RunPaused(RuntimeError):
    """The run cannot go on without a person: the message holds the reasons."""


def check_whole(run_dir: Path) -> None:
    """Raises RunUnusable for a directory with blobs but no journal: a new run there would be taken for the old one."""
    blobs = run_dir / "blobs"
    if not (run_dir / "state.db").exists() and blobs.is_dir() and any(BlobStore(blobs).digests()):
        if (run_dir / UNFINISHED_BACKUP).exists():
            raise RunUnusable(f"{run_dir} is a backup that did not come to its end; give its `dipaco backup` again")
        raise RunUnusable(
            f"{run_dir} has blobs and no state.db: put that file back from a copy, or take another --run-dir"
        )


def write_config(config: Config, run_dir: Path) -> None:
    """Put the configuration of a new run into its directory; on a resumed one refuse what would change its bits."""
    journal = Journal(run_dir)
    try:
        numerics = journal.meta("numerics")
        if numerics not in (None, str(NUMERICS_VERSION)):
            raise RunUnusable(
                f"{run_dir} was computed with numerics version {numerics}, this version of dipaco has "
                f"{NUMERICS_VERSION}; use the version that made it, or another --run-dir"
            )
        stored = journal.meta("config")
        if stored is not None:
            difference = resume_difference(Config.model_validate(json.loads(stored)), config)
            if difference:
                raise RunUnusable(
                    f"{run_dir} was made with another {difference}; only `execution` may change on resume: "
                    "restore the key, or use another --run-dir"
                )
        # Without the note of a backup: from here on it is a run of its own.
        journal.set_meta(config=config.model_dump_json(), numerics=str(NUMERICS_VERSION), backup=None)
        (run_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    finally:
        journal.close()


def serve(
    config: Config,
    run_dir: Path,
    listen: str,
    *,
    insecure: bool = False,
    verify: bool = False,
    ready: Callable[[str], None] = lambda address: None,
    say: Callable[[str], None] = print,
) -> None:
    """Serve a run until it is finished; returns early on SIGINT or SIGTERM, from where a restart goes on.

    `verify`: first read all blobs of a run that goes on, and hold them against their digests. `ready` is told the
    address once workers can connect. Raises RunUnusable, RunPaused, NotAllowed, OSError.
    """
    give_back_large_buffers()
    security = load_security(run_dir, require_certificates=config.execution.require_worker_certificates)
    check_listen(listen, security, insecure)  # before anything of the run is written
    if security is not None:
        for remark in check_server(security.certificate_pem, security.ca_pem, datetime.datetime.now(datetime.UTC)):
            say(remark)
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = RunLock(run_dir)
    try:
        check_whole(run_dir)
        write_config(config, run_dir)
        asyncio.run(_serve_until_signalled(config, run_dir, listen, insecure, ready, say, verify))
    except sqlite3.OperationalError as error:
        raise RunUnusable(f"{run_dir / 'state.db'} cannot be written ({error}); mend that and start again") from None
    finally:
        lock.release()


async def _serve_until_signalled(
    config: Config,
    run_dir: Path,
    listen: str,
    insecure: bool,
    ready: Callable[[str], None],
    say: Callable[[str], None],
    verify: bool,
) -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    await serve_until(stopped, config, run_dir, listen, insecure, ready, say, verify=verify)


async def serve_until(
    stopped: asyncio.Event,
    config: Config,
    run_dir: Path,
    listen: str,
    insecure: bool = False,
    ready: Callable[[str], None] = lambda address: None,
    say: Callable[[str], None] = print,
    verify: bool = False,
) -> None:
    """Serve a prepared run directory until the run is over or `stopped` is set; raises what `serve` does."""
    coordinator = Coordinator(config, run_dir, say)
    log = EventLog(run_dir, config.execution.log_bytes, config.execution.log_files)
    recording = Recording(coordinator, log)
    watching: asyncio.Task[None] | None = None
    try:
        coordinator.open(verify=verify, torn_event=log.torn)
        server = await start_server(
            recording,
            listen,
            security=load_security(run_dir, require_certificates=config.execution.require_worker_certificates),
            insecure=insecure,
            chunk_bytes=config.execution.chunk_bytes,
        )
        watching = asyncio.create_task(recording.watch())
        try:
            (run_dir / "address").write_text(f"{server.address}\n", encoding="utf-8")
            ready(str(server.address))
            await _until_over(coordinator, stopped)
        finally:
            await server.stop()
    finally:
        if watching is not None:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        await coordinator.close()
        log.close()
    if coordinator.paused:
        raise RunPaused(
            f"{coordinator.paused}; mend it and start the same command again (where the remedy lies under "
            "`experiment`: in another --run-dir)"
        )


async def _until_over(coordinator: Coordinator, stopped: asyncio.Event) -> None:
    """Until the run is finished or paused, a signal came, or something broke (which is raised)."""
    watch = asyncio.create_task(coordinator.tick())
    signalled = asyncio.create_task(stopped.wait())
    awaited: set[asyncio.Future[Any]] = {watch, signalled, coordinator.failure}
    await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
    signalled.cancel()
    if coordinator.failure.done():
        watch.cancel()
        coordinator.failure.result()
    if watch.done():
        watch.result()
        await coordinator.farewell()
    watch.cancel()
