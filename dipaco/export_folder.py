"""A folder that appears whole or not at all, and takes another's place only where that was asked for and is an export.

Filled in a hidden folder beside the target, then renamed. What a killed export leaves is that hidden folder; one that
is killed between the two renames of a replacement leaves both exports in it, as `made` and `replaced`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from configs.schema import TopologyConfig
from dipaco.ending import Refused
from model.store import fsync_path

MANIFEST = "export.json"
"""What an exported folder holds; also how one is told from any other folder."""


REPLACED = "replaced"
"""Where, in the hidden folder, an export waits that is being replaced."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModuleVersion(_Part):
    """A module of a path, and the SHA-256 of its weights."""

    module: str
    version: int
    sha256: str


class ExportedPath(_Part):
    """One path: its folder in the export (`.`: the export itself) and its modules.

    `weights` are the SHA-256 of its weights by file name, one a level where files are modules; empty for GGUF.
    """

    folder: str
    weights: dict[str, str]
    modules: list[ModuleVersion]


class Manifest(_Part):
    """export.json. `paths` are by id, of those of `topology`; `router` is the router's folder, null without one."""

    dipaco_export: Literal[1]
    run: str
    format: Literal["hf", "gguf"]
    version: Literal["last", "best"]
    topology: TopologyConfig
    sequence_length: int
    prefix_tokens: int
    router: str | None
    paths: dict[str, ExportedPath]


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of an exported folder, None where there is none; raises Refused where it cannot be read."""
    file = folder / MANIFEST
    try:
        return Manifest.model_validate_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValidationError, UnicodeDecodeError) as error:
        why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        where = ".".join(map(str, error.errors()[0]["loc"])) if isinstance(error, ValidationError) else ""
        raise Refused(
            f"{file} is not one that this version of dipaco wrote ({where or 'the file'}: {why}); export again"
        ) from None


def refuse_to_replace(out: Path, *, overwrite: bool) -> None:
    """Raise Refused where something is at `out` that may not be replaced; an empty folder may."""
    if out.suffix == ".gguf":
        raise Refused(f"{out} is to be a folder, which will hold the .gguf file and what belongs to it; name a folder")
    if not out.exists() and not out.is_symlink():
        return
    if out.is_symlink() or not out.is_dir():
        raise Refused(f"{out} exists and is no folder; name another OUT")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise Refused(f"{out} exists and is not empty; name another OUT, or give --overwrite to replace an export")
    if read_manifest(out) is None:
        raise Refused(f"{out} is not an exported folder (it has no {MANIFEST}), so --overwrite leaves it alone")


@contextmanager
def whole_folder(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """A new folder to fill, which is `out` when this is left without an error, and gone after one; raises Refused."""
    refuse_to_replace(out, overwrite=overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        made = aside / "made"
        made.mkdir()  # unlike the one around it, with the rights that a new folder has here
        yield made
        for folder in (made, *(path for path in made.rglob("*") if path.is_dir())):
            fsync_path(folder)
        refuse_to_replace(out, overwrite=overwrite)  # again: it took a while
        _replace(out, made, aside / REPLACED)
        fsync_path(out.parent)
    finally:
        if out.exists() or not (aside / REPLACED).exists():
            shutil.rmtree(aside, ignore_errors=True)


def _replace(out: Path, made: Path, replaced: Path) -> None:
    """Rename what is at `out`, if anything, to `replaced`, and `made` to `out`; on any error all is as before.

    Raises Refused where even that fails: both are whole then, under the hidden names that it says.
    """
    try:
        if out.is_dir():
            os.rename(out, replaced)
        os.rename(made, out)
    except BaseException as error:
        if made.exists() and replaced.exists():
            try:
                os.rename(replaced, out)
            except OSError:
                raise Refused(
                    f"{out} could not be replaced ({error}), nor put back: the former export is {replaced}"
                ) from error
        raise
