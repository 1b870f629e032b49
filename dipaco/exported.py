"""Text from an exported folder, without its run: its paths under the engine, chosen by its router where it has one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.routes import Route
from corpus.tokenizer import Tokenizer
from dipaco.ending import Refused
from dipaco.examples import CACHE_BYTES, Continuation, Desk, Wish, finished
from dipaco.export_folder import MANIFEST, Manifest, read_manifest
from dipaco.writing import Writing
from inference.engine import Engine
from inference.ensemble import Ensemble
from inference.module_cache import DamagedModule, ModuleCache
from inference.path_source import PathSource
from model.checkpoint_files import TOKENIZER
from model.hugging_face import model_of
from model.store import BlobStore, UnknownBlob
from model.topology import Topology, UnknownPath
from routing.artefact import RouterArtefact, one_module
from routing.router import OnePath


def is_exported(folder: Path) -> bool:
    """Whether it is an export of paths or of a router; raises Refused where its manifest cannot be read."""
    return read_manifest(folder) is not None


@dataclass(frozen=True, slots=True)
class ExportedMixture:
    """The paths of an opened export, by the ids that they had in the run: all of them, or a single one."""

    folder: Path
    source: PathSource
    path_ids: tuple[str, ...]
    tokenizer: Tokenizer
    prefix_tokens: int
    artefact: RouterArtefact | None

    def continuations(self, prompts: Sequence[str], wish: Wish) -> Iterator[Continuation]:
        """Each prompt continued; raises Refused without a router where it takes one, UnknownPath, UnknownRoute."""
        return (finished(prompt, writing) for prompt, writing in self.writings(prompts, wish))

    def writings(self, prompts: Sequence[str], wish: Wish) -> Iterator[tuple[str, Writing]]:
        """Each prompt with its text, which is written while it is iterated; raises what `continuations` does."""
        desk = self._desk(wish)
        return ((prompt, desk.write(prompt, wish)) for prompt in prompts)

    def _desk(self, wish: Wish) -> Desk:
        path = self._path(wish)
        router = OnePath() if self.artefact is None or path is not None else self.artefact.router
        ends = (self.tokenizer.bos_id, self.tokenizer.eos_id)
        engine: Engine | Ensemble = Engine(self.source, router, self.prefix_tokens, *ends)
        if wish.ensemble > 1:
            Route("ensemble", num_paths=wish.ensemble).check(len(self.path_ids))
            engine = Ensemble(self.source, router, self.prefix_tokens, *ends, num_paths=wish.ensemble)
        return Desk(engine, self.tokenizer, self.path_ids.__getitem__, path)

    def elsewhere(self, prompt: str) -> str | None:
        """The path that the router names for a prompt, where this export has no such path."""
        if self.artefact is None:
            return None
        tokens = np.array([self.tokenizer.bos_id, *self.tokenizer.encode(prompt)], np.int64)
        posterior, _ = self.artefact.router.route(tokens)
        named = self.artefact.paths[int(posterior.argmax())]
        return None if named in self.path_ids else named

    def _path(self, wish: Wish) -> int | None:
        if wish.by_router_lm:
            raise Refused("an exported folder has no router LM: leave --route router:W out, or use the run")
        if wish.path is not None:
            if wish.path not in self.path_ids:
                raise UnknownPath(f"there is no path {wish.path!r} in this folder; it has {', '.join(self.path_ids)}")
            return self.path_ids.index(wish.path)
        if len(self.path_ids) == 1:
            return 0
        if self.artefact is None:
            raise Refused("this folder has several paths and no router; export --router, too, or name one: --path I.J")
        return None


@contextmanager
def opened(folder: Path) -> Iterator[ExportedMixture]:
    """The exported folder, whose files stay where they are; weights are held against their digests when first read.

    Raises Refused (in the block, too, where weights are missing or changed), IncompatibleCheckpoint, BadTokenizer,
    BadArtefact.
    """
    manifest = _manifest(folder)
    folders = {path_id: folder / path.folder for path_id, path in manifest.paths.items()}
    first = next(iter(folders.values()))
    model, vocab_size = model_of(first)
    weights = [list(path.weights.items()) for path in manifest.paths.values()]
    by_module = len(folders) > 1 or len(weights[0]) > 1
    topology = Topology.from_config(manifest.topology) if by_module else one_module(model)
    router = manifest.router
    with tempfile.TemporaryDirectory(prefix="dipaco-exported-") as scratch:
        store = BlobStore(Path(scratch), known_as=folder)
        for path_folder, files in zip(folders.values(), weights, strict=True):
            for name, digest in files:
                if not store.path(digest).is_symlink():
                    store.path(digest).symlink_to((path_folder / name).resolve())
        digests = [[digest for _, digest in files] for files in weights]
        try:
            yield ExportedMixture(
                folder=folder,
                source=PathSource(model, vocab_size, topology, digests, ModuleCache(store, CACHE_BYTES)),
                path_ids=tuple(folders),
                tokenizer=Tokenizer.from_file(first / TOKENIZER),
                prefix_tokens=manifest.prefix_tokens,
                artefact=None if router is None else RouterArtefact.open(folder / router),
            )
        except (DamagedModule, UnknownBlob):
            raise Refused(
                f"the weights in {folder} are not those that its {MANIFEST} names; export the run again"
            ) from None


def _manifest(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    if manifest is None:
        raise Refused(f"{folder} is not an exported folder: it has no {MANIFEST}")
    if not manifest.paths:
        raise Refused(f"{folder} holds a router and no path; `dipaco export RUN --all --router OUT` exports both")
    if manifest.format != "hf":
        raise Refused(
            f"{folder} holds GGUF files, which are for llama.cpp and Ollama; export with --format hf for this"
        )
    return manifest
