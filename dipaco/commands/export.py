"""`dipaco export`: paths and the router of a run as files that other engines load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dipaco.commands.options import Json, Run, VersionName


def export(
    run: Run,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make; it appears whole or not at all.")],
    path: Annotated[str | None, typer.Option(help="The path (like 0.1) to export, into OUT itself.")] = None,
    all_paths: Annotated[
        bool, typer.Option("--all", help="Every path, into folders path-I.J in OUT; hf stores shared modules once.")
    ] = False,
    router: Annotated[
        bool, typer.Option("--router", help="The router with its base LM, into the folder router in OUT.")
    ] = False,
    file_format: Annotated[
        str, typer.Option("--format", help="Of paths: hf (Hugging Face checkpoint) or gguf (llama.cpp, Ollama).")
    ] = "hf",
    version: VersionName = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT where it is an earlier export; nothing else is replaced.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Export paths as ordinary models, and the router that chooses between them.

    A path is a complete Llama (or Qwen3) model: transformers loads hf, llama.cpp and Ollama load gguf (float32). OUT
    has a README.md that says which text goes to which path. `dipaco generate OUT` continues text from hf exports, by
    the router where it is there, and needs no run.
    """
    from rich.console import Console
    from rich.markup import escape

    from coordinator.snapshot import RunSnapshot
    from dipaco.early_stopping import version_named
    from dipaco.ending import no_room_at
    from dipaco.export import ExportWish, format_named
    from dipaco.export import export as write_export
    from dipaco.export_folder import refuse_to_replace

    wish = ExportWish(
        path=path,
        all_paths=all_paths,
        router=router,
        file_format=format_named(file_format),
        version=version_named(version or "last"),
    )
    refuse_to_replace(out, overwrite=overwrite)
    progress = Console(stderr=True)
    with no_room_at(out), RunSnapshot.held(run) as snapshot, progress.status("reading the run") as status:
        made = write_export(
            snapshot, wish, out, overwrite=overwrite, say=lambda line: status.update(escape(f"exporting {line}"))
        )
    if as_json:
        typer.echo(json.dumps({"out": str(out), **made}))
        return
    ids = list(made["paths"])
    parts = [f"path {ids[0]}" if len(ids) == 1 else f"{len(ids)} paths"] if ids else []
    parts += ["the router"] if made["router"] else []
    typer.echo(
        f"{out} holds {' and '.join(parts)} of {made['run']} ({made['bytes'] / 1e6:,.1f} MB); see {out}/README.md"
    )
