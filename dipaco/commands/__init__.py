"""The commands, one file each. Heavy imports happen inside them, so that `dipaco --help` answers at once."""

from __future__ import annotations

import typer

from dipaco.commands.backup import backup
from dipaco.commands.certs import certs
from dipaco.commands.chat import chat
from dipaco.commands.cloze import cloze
from dipaco.commands.coordinator import coordinator
from dipaco.commands.corpus import corpus
from dipaco.commands.digest import digest
from dipaco.commands.evaluate import evaluate
from dipaco.commands.export import export
from dipaco.commands.gateway import gateway
from dipaco.commands.generate import generate
from dipaco.commands.route import route
from dipaco.commands.run import run
from dipaco.commands.serve import serve
from dipaco.commands.simulate import simulate
from dipaco.commands.status import status
from dipaco.commands.worker import worker

app = typer.Typer(
    name="dipaco",
    help="Train language models on machines that are far apart, uneven and preemptible; answer with one small path.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (
    run,
    coordinator,
    worker,
    certs,
    status,
    evaluate,
    cloze,
    generate,
    chat,
    serve,
    gateway,
    route,
    digest,
    corpus,
    export,
    simulate,
    backup,
):
    app.command()(command)
