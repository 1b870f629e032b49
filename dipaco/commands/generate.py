"""`dipaco generate`: text from a run, each prompt answered by the path that the router picks for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dipaco.commands.options import Json, Run, VersionName

if TYPE_CHECKING:
    from dipaco.examples import Continuation
    from dipaco.writing import Writing


def generate(
    run: Run,
    stdin: Annotated[
        str | None, typer.Argument(metavar="[-]", help="Read the text to continue from standard input.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; may be repeated.")] = None,
    file: Annotated[Path | None, typer.Option(help="File with the text to continue (UTF-8).")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 80,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample among so many likeliest tokens.")] = 40,
    top_p: Annotated[
        float | None, typer.Option(help="Sample among the fewest tokens of this probability together.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End the text before this string; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    every: Annotated[int | None, typer.Option(min=1, help="Route again after every so many tokens.")] = None,
    path: Annotated[str | None, typer.Option(help="Use this path (like 0.1) instead of routing.")] = None,
    route: Annotated[
        str | None,
        typer.Option(
            help="sequence, every:W (as --every W), router:W (the router LM, every W tokens), path:I.J (as --path I.J) "
            "or ensemble:N (N paths together)."
        ),
    ] = None,
    version: VersionName = None,
    as_json: Json = False,
) -> None:
    """Continue prompts, and show the paths they took.

    The text appears as it is written, each path in a colour of its own; [1.0] in the middle of it: from there on path
    1.0 (of two levels: module 1, then module 0) wrote, after a later look of the router (--every). The line below says
    how fast it was, and by which paths.

    Without a prompt it continues one example of every kind of text in the embedded corpus. RUN may be a folder that
    `dipaco export` made, which needs nothing of its run.
    """
    from coordinator.snapshot import RunSnapshot
    from dipaco.early_stopping import version_named
    from dipaco.ending import Refused
    from dipaco.examples import EXAMPLE_PROMPTS, Wish, continuations, writings
    from dipaco.exported import is_exported, opened
    from dipaco.reading import read_text
    from inference.sampling import Sampling

    if stdin not in (None, "-"):
        raise Refused(f"{stdin!r} is no input; give a text as --prompt, or - to read it from standard input")
    if [stdin, prompt, file].count(None) < 2:
        raise Refused("give one of --prompt TEXT, --file FILE, or - to read a text from standard input")
    given = [read_text(file)] if stdin or file is not None else prompt
    prompts = given or list(EXAMPLE_PROMPTS.values())
    sampling = Sampling(temperature, top_k, top_p, seed)
    ends = tuple(stop or ())
    wish = Wish(tokens, sampling, every=every, path=path, version=version_named(version or "last"), stop=ends)
    if route is not None:
        wish = wish.routed(route)
    if is_exported(run):
        if version is not None:
            raise Refused("an exported folder has the version that it was exported with; leave --version out")
        with opened(run) as exported:
            if as_json:
                _show(exported.continuations(prompts, wish), as_json)
            else:
                _stream(exported.writings(prompts, wish))
            for named in {named for prompt in prompts if (named := exported.elsewhere(prompt))}:
                typer.echo(f"the router names path {named}, which this folder does not hold", err=True)
        return
    with RunSnapshot.held(run) as snapshot:
        if as_json:
            _show(continuations(snapshot, prompts, wish), as_json)
        else:
            _stream(writings(snapshot, prompts, wish))


def _stream(texts: Iterator[tuple[str, Writing]]) -> None:
    """Prompts and their texts, as they are written."""
    from rich.console import Console
    from rich.text import Text

    from dipaco.writing import show

    console, colours = Console(), dict[str, str]()
    for prompt, writing in texts:
        console.print(Text(f"\n{prompt}", "dim"), end="", soft_wrap=True)
        show(writing, console, colours)


def _show(written: Iterator[Continuation], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps([each.as_dict() for each in written]))
        return
    from rich.console import Console

    from dipaco.table import example_text

    console = Console()
    for each in written:
        console.print(example_text(each), soft_wrap=True)
