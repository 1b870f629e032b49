"""What early stopping has chosen in a run, and what `best` costs: bytes kept for it alone, and sharing that is lost."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, get_args

from coordinator.snapshot import RunSnapshot
from coordinator.state import Version
from dipaco.ending import Refused


def version_named(name: str) -> Version:
    """`last` or `best`; raises Refused for another name."""
    for version in get_args(Version):
        if name == version:
            return version  # type: ignore[no-any-return]
    raise Refused(f"version {name!r} is none of {', '.join(get_args(Version))}")


def early_stopping_of(snapshot: RunSnapshot) -> dict[str, Any]:
    """What a report has of it; empty where a run has measured no best version.

    `paths` {path: {version, stop_loss, tokens}}: outer steps that its best modules have taken, and nats a token on its
    stop sequences; null where it has none. `kept_bytes`: of module versions that nothing but `best` needs.
    `versions_per_module`: how many versions of a module the best paths use, mean over modules; 1 shares all of them.
    """
    topology, best = snapshot.topology, [row for row in snapshot.state.best.values() if row.modules]
    if not best:
        return {}
    paths: dict[str, dict[str, Any] | None] = dict.fromkeys(map(topology.path_id, range(topology.num_paths)))
    for row in sorted(best, key=lambda row: row.path_index):
        measured = {"stop_loss": row.loss_sum / row.tokens, "tokens": row.tokens}
        paths[topology.path_id(row.path_index)] = {"version": row.modules[0].version, **measured}
    used: dict[str, set[str]] = defaultdict(set)
    for path in snapshot.paths(version="best"):
        for module in path.modules:
            used[module.module_id].add(module.blob.digest)
    blobs = {module.blob.digest: module.blob.size for row in best for module in row.modules}
    modules = snapshot.state.modules.values()
    elsewhere = {ref.digest for module in modules for ref in (module.params, *module.history)}
    return {
        "paths": paths,
        "kept_bytes": sum(size for digest, size in blobs.items() if digest not in elsewhere),
        "versions_per_module": sum(map(len, used.values())) / len(used),
    }


def early_stopping_line(found: dict[str, Any]) -> str:
    """The same in one line."""
    versions, kept = [path["version"] for path in found["paths"].values() if path], found["kept_bytes"] / 1e6
    return (
        f"best versions {min(versions)} to {max(versions)} of {len(versions)} paths: {kept:,.1f} MB kept for them, "
        f"{found['versions_per_module']:.2f} versions a module (1.00: all are shared)"
    )
