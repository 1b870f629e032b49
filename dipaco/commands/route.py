"""`dipaco route`: which path the router gives a text and why, or how it fares with the traffic of today."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from dipaco.commands.options import Json, Run, VersionName


def route(
    run: Run,
    stdin: Annotated[
        str | None, typer.Argument(metavar="[-]", help="- reads one text from standard input.", show_default=False)
    ] = None,
    text: Annotated[str | None, typer.Option(help="One text to route.")] = None,
    file: Annotated[Path | None, typer.Option(help="A file (UTF-8) that is one text to route.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Many documents (.jsonl, .parquet, .txt): load, confidence and drift.")
    ] = None,
    every: Annotated[
        int | None, typer.Option(min=1, help="Of one text: route again after every so many tokens.")
    ] = None,
    oracle: Annotated[
        bool,
        typer.Option("--oracle", help="With --data: agreement with the best path; runs the text through every path."),
    ] = False,
    sample: Annotated[
        int, typer.Option(min=0, help="Training sequences to compare with, at most; 0 leaves the comparison out.")
    ] = 512,
    version: VersionName = None,
    as_json: Json = False,
) -> None:
    """Show which path a text takes and why, or how far many texts are from what was trained on.

    One text (--text, --file or -): its path, the posterior over paths, and training sequences of that path that lie
    near to it in the router's feature space. Of clusters the posterior is a softmax of minus half the squared
    distances: it says which is nearest rather than how likely it is to be the best.

    Many documents (--data): the load on each path, the highest posterior, and drift: PSI (population stability index,
    sum of (p - q) ln(p / q)) of the path loads and of the deciles of every feature against training sequences routed
    alike, beside what chance alone makes of it; the Jensen-Shannon divergence (bits) of the loads from the shards.
    """
    from rich.console import Console
    from rich.markup import escape

    from coordinator.snapshot import RunSnapshot
    from dipaco.early_stopping import version_named
    from dipaco.ending import Refused
    from dipaco.route_table import text_view, traffic_view
    from dipaco.routed_text import route_text
    from dipaco.routed_traffic import route_traffic

    if stdin not in (None, "-"):
        raise Refused(f"{stdin!r} is no input; give a text as --text, or - to read it from standard input")
    if [stdin, text, file, data].count(None) != 3:
        raise Refused("give one of --text TEXT, --file FILE, --data FILE, or - to read a text from standard input")
    if data is not None and every is not None:
        raise Refused("--every is for one text; `dipaco evaluate RUN --data FILE --route every:W` routes many again")
    if data is None and oracle:
        raise Refused("--oracle needs --data: how often the router is right is a matter of many texts")
    if version is not None and not oracle:
        raise Refused("--version is of the paths that --oracle runs; the router is the same for all versions")
    given = "" if data is not None else _text(text, file)
    progress = Console(stderr=True)
    with RunSnapshot.held(run) as snapshot, progress.status("reading the router") as status:

        def say(line: str) -> None:
            status.update(escape(line))

        if data is not None:
            of_paths = version_named(version or "last")
            traffic = route_traffic(snapshot, data, oracle=oracle, sample=sample, version=of_paths, say=say)
            answer, view = traffic, traffic_view(traffic)
        else:
            routed = route_text(snapshot, given, every=every, sample=sample, say=say)
            answer, view = routed.as_dict(), text_view(routed)
    if as_json:
        typer.echo(json.dumps(answer, ensure_ascii=False))
    else:
        Console().print(view)


def _text(text: str | None, file: Path | None) -> str:
    """The text itself; raises Refused where a file or standard input is none."""
    from dipaco.ending import Refused

    if text is not None:
        return text
    data = sys.stdin.buffer.read() if file is None else file.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        name = "standard input" if file is None else str(file)
        raise Refused(f"{name} is not UTF-8 text (byte {error.start}); --data reads other kinds of files") from None
