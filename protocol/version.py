"""Which protocol this package speaks, and the refusal of another one.

The same major number is required; a higher minor number may add fields and calls, and informs only.
"""

from __future__ import annotations

from importlib import metadata

from protocol.errors import VersionMismatch

PROTOCOL_MAJOR = 1
PROTOCOL_MINOR = 1


def package_version() -> str:
    """The version of the installed dipaco; `unknown` where it runs from a tree that was not installed."""
    try:
        return metadata.version("dipaco")
    except metadata.PackageNotFoundError:
        return "unknown"


def check_worker_version(worker_major: int, worker_package: str) -> None:
    """Raise VersionMismatch, naming the version to install, where the worker speaks another major version."""
    if worker_major != PROTOCOL_MAJOR:
        raise VersionMismatch(
            f"the coordinator speaks protocol {PROTOCOL_MAJOR} (dipaco {package_version()}), the worker protocol "
            f"{worker_major} (dipaco {worker_package or 'unknown'}); install dipaco=={package_version()} on the worker"
        )
