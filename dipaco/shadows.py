"""Start-up check: every top-level package of ours must come from the folder that this one comes from.

The names are ordinary words (`model`, `configs`): another distribution or a folder in the working directory can stand
in front of them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

PACKAGES = ("configs", "protocol", "model", "corpus", "routing", "coordinator", "worker", "inference", "dipaco")


def find(packages: tuple[str, ...] = PACKAGES, home: Path | None = None) -> str | None:
    """A sentence that names the first package found outside `home` (the folder of this installation), or None."""
    home = (home or Path(__file__).parent.parent).resolve()
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None:
            return f"package {package!r} of this installation is missing from {home}; install dipaco again"
        places = [Path(place).resolve() for place in spec.submodule_search_locations or [spec.origin or ""]]
        if home / package not in places:
            return (
                f"package {package!r} is taken from {places[0]} instead of {home / package}; "
                "remove or rename it, start from another folder, or use an environment of its own"
            )
    return None
