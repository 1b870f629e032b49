"""`dipaco chat`: a conversation at the terminal."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from dipaco.commands.options import Run, VersionName


def chat(
    run: Run,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 120,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.7,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample among so many likeliest tokens.")] = 40,
    top_p: Annotated[
        float | None, typer.Option(help="Sample among the fewest tokens of this probability together.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End an answer before this string; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling of the first answer; each has the next one.")] = 0,
    route: Annotated[
        str, typer.Option(help="sequence, every:W, router:W, path:I.J or ensemble:N (W tokens, N paths).")
    ] = "sequence",
    plain: Annotated[
        bool, typer.Option("--plain", help="No turns: each line that you type goes on with the text so far.")
    ] = False,
    version: VersionName = None,
) -> None:
    """Talk to a run, each answer shown as it is written, its paths in colours.

    The models of a run are base models: they continue text, and an answer is what they take for the next line of a
    conversation. Standard input may be a file or a pipe, one line a turn. An empty line or Ctrl-D ends it.
    """
    from dataclasses import replace

    from rich.console import Console
    from rich.text import Text

    from coordinator.snapshot import RunSnapshot
    from dipaco.chatting import Conversation, room_for_turns
    from dipaco.early_stopping import version_named
    from dipaco.examples import Desk, Wish
    from dipaco.writing import show
    from inference.chat_template import TURN_ENDS
    from inference.sampling import Sampling

    ends = (*(stop or ()), *(() if plain else TURN_ENDS))
    sampling = Sampling(temperature, top_k, top_p, seed)
    wish = Wish(tokens, sampling, version=version_named(version or "last"), stop=ends).routed(route)
    console, colours, conversation = Console(), dict[str, str](), Conversation()
    with RunSnapshot.held(run) as snapshot:
        desk = Desk.open(snapshot, wish)
        length = snapshot.config.experiment.model.sequence_length

        def count(text: str) -> int:
            return len(desk.tokenizer.encode(text))

        room = 0 if plain else room_for_turns(length, tokens, count)
        name = snapshot.config.name
        console.print(
            f"{name} is a base model: it continues text and was not trained to answer. An empty line ends.",
            style="dim",
            soft_wrap=True,
        )
        so_far = ""
        while said := _line(console):
            prompt = so_far + said if plain else conversation.prompt_within(said, room, count)
            writing = desk.write(prompt, wish)
            try:
                show(writing, console, colours)
            except KeyboardInterrupt:  # ends the answer, not the conversation
                console.print(Text("\n(interrupted)", "dim"))
            so_far = prompt + writing.text
            conversation.add(said, writing.text)
            wish = replace(wish, sampling=replace(wish.sampling, seed=wish.sampling.seed + 1))


def _line(console: object) -> str:
    """What the person says; empty at the end."""
    from rich.console import Console

    assert isinstance(console, Console)
    if sys.stdin.isatty():
        try:
            return console.input("[bold]> [/bold]").strip()
        except (EOFError, KeyboardInterrupt):
            return ""
    line = sys.stdin.readline().strip()
    if line:
        console.print(f"> {line}", style="bold", markup=False, highlight=False)
    return line
