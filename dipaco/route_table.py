"""What a router does, as a terminal shows it: one text with its reasons, or the loads and drift of many."""

from __future__ import annotations

from typing import Any

from dipaco.routed_text import Reason, RoutedText

MOST_PATHS = 8
MOST_DOMAINS = 5


def text_view(routed: RoutedText) -> Any:
    """A text's path, how sure it is, how it goes on, and why."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    router = routed.router
    parts: list[Any] = [
        Text.assemble(("path ", "bold"), (routed.path, "bold cyan"), f"  {_percent(routed.posterior[routed.path])}"),
        Text(
            f"router {router['kind']} {router['version'][:12]} of {router['paths']} paths; it looked at "
            f"{routed.prefix_tokens} of {routed.tokens} tokens: {routed.prefix!r}"
        ),
    ]
    if routed.warning:
        parts.append(Text(f"warning: {routed.warning}", style="bold yellow"))
    posterior = Table(title="posterior", title_justify="left")
    posterior.add_column("path", no_wrap=True)
    posterior.add_column("probability", justify="right")
    for path, share in list(routed.posterior.items())[:MOST_PATHS]:
        posterior.add_row(path, _percent(share))
    left_out = len(routed.posterior) - MOST_PATHS
    if left_out > 0:
        posterior.caption = f"and {left_out} more paths"
    parts.append(posterior)
    if routed.chunks:
        looks = Table(title="routed again on the way", title_justify="left")
        for column in ("tokens", "path"):
            looks.add_column(column, no_wrap=True)
        looks.add_column("probability", justify="right")
        looks.add_column("text")
        for look in routed.chunks:
            looks.add_row(f"{look.first}-{look.last}", look.path, _percent(look.probability), Text(look.text))
        parts.append(looks)
    if routed.why is not None:
        parts.append(_reason(routed.path, routed.why))
    return Group(*parts)


def _reason(path: str, why: Reason) -> Any:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"why path {path}: training sequences of it", title_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("distance", justify="right")
    table.add_column("domain", no_wrap=True)
    table.add_column("begins with")
    for title, examples in (("nearest to the text", why.nearest), ("nearest to their mean", why.typical)):
        for example in examples:
            table.add_row(title, f"{example.distance:.3g}", Text(example.domain), Text(example.text))
            title = ""
        table.add_section()
    domains = [f"{name} {_percent(share)}" for name, share in list(why.domains.items())[:MOST_DOMAINS]]
    rest = len(why.domains) - MOST_DOMAINS
    more = f", {rest} more" if rest > 0 else ""
    lines = [f"the path was trained on {why.sequences:,} sequences: {', '.join(domains)}{more}"]
    if why.usual_distance is not None and why.as_far is not None:
        lines.append(
            f"distances are in the router's space; of {why.sampled:,} training sequences of the path half are within "
            f"{why.usual_distance:.3g} of another one, and {_percent(why.as_far)} are as far from any as this text is"
        )
    return Group(table, Text("\n".join(lines)))


def traffic_view(found: dict[str, Any]) -> Any:
    """Loads by path, then confidence, drift and agreement in sentences."""
    from rich.console import Group
    from rich.text import Text

    router = found["router"]
    head = Text(
        f"{found['data']}: {found['documents']:,} documents, {found['sequences']:,} sequences, "
        f"{found['tokens']:,} tokens; router {router['kind']} {router['version'][:12]} of {router['paths']} paths"
    )
    lines = [*_confidence_lines(found), *_drift_lines(found["drift"])]
    if found["oracle"] is not None:
        lines += _oracle_lines(found["oracle"])
    if found["short_sequences"]:
        lines.append(
            f"{found['short_sequences']:,} sequences have fewer than the {router['prefix_tokens']} tokens that the "
            "router was made for"
        )
    return Group(head, _loads(found), Text("\n".join(lines)))


def _loads(found: dict[str, Any]) -> Any:
    """Paths by their load, the highest first."""
    from rich.table import Table

    columns = {
        "traffic": found["load"],
        "training, routed alike": found["training_load"],
        "shard, sequences": found["shard_sequences"],
        "shard, tokens": found["shard_tokens"],
        "oracle": found["oracle"] and found["oracle"]["oracle_load"],
    }
    shown = {name: loads for name, loads in columns.items() if loads is not None}
    table = Table(title="load on each path", title_justify="left")
    table.add_column("path", no_wrap=True)
    for name in shown:
        table.add_column(name, justify="right")
    paths = sorted(found["load"], key=lambda path: -found["load"][path])
    for path in paths[: 2 * MOST_PATHS]:
        table.add_row(path, *(_percent(loads[path]) for loads in shown.values()))
    rest = paths[2 * MOST_PATHS :]
    if rest:
        shares = (_percent(sum(loads[path] for path in rest)) for loads in shown.values())
        table.add_row(f"{len(rest)} more", *shares)
    return table


def _confidence_lines(found: dict[str, Any]) -> list[str]:
    lines = []
    for name, confidence in (("traffic", found["confidence"]), ("training", found["training_confidence"])):
        if confidence is not None:
            quantiles = ", ".join(
                f"{100 * float(share):.0f} % {value:.3f}" for share, value in confidence["quantiles"].items()
            )
            lines.append(f"highest posterior, {name}: mean {confidence['mean']:.3f}; quantiles {quantiles}")
    return lines


def _drift_lines(drift: dict[str, Any]) -> list[str]:
    lines = []
    load, features = drift["path_load"], drift["features"]
    if load is not None:
        lines.append(
            f"drift of path loads: {load['verdict']} (PSI {load['psi']:.3f}, by chance up to "
            f"{load['psi_by_chance']:.3f}; Jensen-Shannon {load['jensen_shannon']:.4f} bits)"
        )
    lines.append(
        f"from the shards' sequences {drift['jensen_shannon_to_shard_sequences']:.4f} bits, from their tokens "
        f"{drift['jensen_shannon_to_shard_tokens']:.4f} bits"
    )
    if features is not None:
        lines.append(
            f"drift of {features['features']} features: {features['verdict']} (PSI median "
            f"{features['psi_median']:.3f}, highest {features['psi_highest']:.3f}, {features['psi_above_0.25']} above "
            f"0.25, by chance up to {features['psi_by_chance']:.3f}; means moved by {features['rms_shift']:.2f} "
            f"standard deviations, by chance {features['rms_shift_by_chance']:.2f})"
        )
    return lines


def _oracle_lines(oracle: dict[str, Any]) -> list[str]:
    return [
        f"the router takes the path of the lowest loss for {_percent(oracle['agreement'])} of {oracle['sequences']:,} "
        f"sequences ({_percent(oracle['by_chance'])} by chance); nats per token: router {oracle['router_loss']:.4f}, "
        f"oracle {oracle['oracle_loss']:.4f}, path {oracle['best_path']} alone {oracle['best_path_loss']:.4f}"
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
