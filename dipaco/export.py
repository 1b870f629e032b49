"""Paths and the router of a run as folders that other engines load: Hugging Face checkpoints, or GGUF files.

One path is the folder itself; all paths are folders path-I.J in it, where a module's file is one file on the disk,
however many paths have it. Whatever is exported was held against its digest on the way.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from configs.schema import TopologyConfig
from coordinator.pins import NO_LINKS
from coordinator.plan import BASE, MIXTURE
from coordinator.snapshot import RunSnapshot
from coordinator.state import Version
from corpus.gguf_vocabulary import GgufVocabulary, gguf_vocabulary
from corpus.tokenizer import Tokenizer
from dipaco.ending import Refused
from dipaco.export_card import TextOfPath, card, gguf_file_name, text_of_paths
from dipaco.export_folder import MANIFEST, ExportedPath, Manifest, ModuleVersion, whole_folder
from dipaco.run_router import open_router
from inference.module_cache import verify_module
from model.checkpoint_files import WEIGHTS, CheckpointTokenizer, write_json
from model.gguf import require_gguf, write_gguf
from model.hugging_face import export_modules, export_path
from model.layout import module_spec
from model.path import compose
from model.store import fsync_path
from protocol.tasks import PathRef
from routing.artefact import write_router

FileFormat = Literal["hf", "gguf"]
ROUTER_FOLDER = "router"
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ExportWish:
    """What to export. `path`: its id, None for none; `all_paths` and `router` say whether those are."""

    path: str | None = None
    all_paths: bool = False
    router: bool = False
    file_format: FileFormat = "hf"
    version: Version = "last"

    def __post_init__(self) -> None:
        if self.path is not None and self.all_paths:
            raise Refused("--path names one path and --all means every one; give one of them")
        if self.path is None and not self.all_paths and not self.router:
            raise Refused("there is nothing to export; give --path I.J, --all or --router")


def format_named(name: str) -> FileFormat:
    """`hf` or `gguf`; raises Refused for another name."""
    for file_format in get_args(FileFormat):
        if name == file_format:
            return file_format  # type: ignore[no-any-return]
    raise Refused(f"format {name!r} is none of {', '.join(get_args(FileFormat))}")


def export(
    snapshot: RunSnapshot, wish: ExportWish, out: Path, *, overwrite: bool = False, say: Say = lambda line: None
) -> dict[str, Any]:
    """Write the folder `out`; returns its manifest (export.json), and how many bytes its files take on the disk.

    Raises Refused, UnknownPath, RunUnusable, DamagedModule, InexpressibleTokenizer, MissingExtra.
    """
    with whole_folder(out, overwrite=overwrite) as folder:
        manifest = _Export(snapshot, wish, folder, say).write()
        return {**manifest.model_dump(mode="json"), "bytes": _bytes_on_disk(folder)}


@dataclass(slots=True)
class _Export:
    """One export into one folder."""

    snapshot: RunSnapshot
    wish: ExportWish
    folder: Path
    say: Say
    linked: dict[str, Path] = field(default_factory=dict)  # digest -> the first file of it

    def write(self) -> Manifest:
        chosen = self._chosen()
        vocabulary = self._vocabulary() if chosen and self.wish.file_format == "gguf" else None
        exported = {}
        for number, ref in enumerate(chosen, start=1):
            self.say(f"path {self._path_id(ref)} ({number} of {len(chosen)})")
            exported[self._path_id(ref)] = self._write_path(ref, vocabulary)
        self.say("which text goes to which path")
        texts = text_of_paths(self.snapshot)
        router = ROUTER_FOLDER if self.wish.router else None
        if router is not None:
            self._write_router(texts)
        manifest = self._manifest(exported, router)
        (self.folder / "README.md").write_text(card(self.snapshot, texts, manifest), encoding="utf-8")
        write_json(self.folder / MANIFEST, manifest.model_dump(mode="json"))
        for file in self.folder.rglob("*"):
            if file.is_file():
                fsync_path(file)
        return manifest

    @property
    def _model(self) -> str:
        return MIXTURE if MIXTURE in self.snapshot.models() else BASE

    def _chosen(self) -> list[PathRef]:
        if self.wish.path is None and not self.wish.all_paths:
            return []
        index = None
        if self.wish.path is not None:
            index = self.snapshot.plan.topology(self._model).path_index(self.wish.path)
        paths = self.snapshot.paths(self._model, self.wish.version)
        return paths if index is None else [paths[index]]

    def _vocabulary(self) -> GgufVocabulary:
        require_gguf()
        return gguf_vocabulary(Tokenizer.from_file(self.snapshot.tokenizer_path))

    def _path_id(self, ref: PathRef) -> str:
        return self.snapshot.plan.topology(self._model).path_id(ref.path_index)

    def _write_path(self, ref: PathRef, vocabulary: GgufVocabulary | None) -> ExportedPath:
        path_id = self._path_id(ref)
        folder = self.folder / f"path-{path_id}" if self.wish.all_paths else self.folder
        folder.mkdir(exist_ok=True)
        for module in ref.modules:
            if module.blob.digest not in self.linked:
                verify_module(self.snapshot.store, module.module_id, module.blob.digest)
                self.linked[module.blob.digest] = self.snapshot.store.path(module.blob.digest)
        weights: dict[str, str] = {}
        if vocabulary is not None:
            self._write_gguf(folder, ref, path_id, vocabulary)
        elif self.wish.all_paths:
            weights = self._write_modules(folder, ref)
        else:
            model, vocab_size = self.snapshot.config.experiment.model, self.snapshot.vocab_size
            tensors = compose(*self._composing(ref))
            weights[WEIGHTS] = export_path(folder, model, vocab_size, tensors, self._tokenizer())
        modules = [
            ModuleVersion(module=module.module_id, version=module.version, sha256=module.blob.digest)
            for module in ref.modules
        ]
        return ExportedPath(folder=folder.relative_to(self.folder).as_posix(), weights=weights, modules=modules)

    def _composing(self, ref: PathRef) -> tuple[Any, ...]:
        """What `compose` takes for the path."""
        topology = self.snapshot.plan.topology(self._model)
        files = {module.module_id: self.snapshot.store.path(module.blob.digest) for module in ref.modules}
        return self.snapshot.config.experiment.model, self.snapshot.vocab_size, topology, files

    def _tokenizer(self) -> CheckpointTokenizer:
        tokenizer = Tokenizer.from_file(self.snapshot.tokenizer_path)
        return CheckpointTokenizer(self.snapshot.tokenizer_path.read_bytes(), tokenizer.bos_id, tokenizer.eos_id)

    def _write_modules(self, folder: Path, ref: PathRef) -> dict[str, str]:
        """A checkpoint of one file a module: the blob itself, copied once and linked where it comes again."""
        model, vocab_size, topology, files = self._composing(ref)
        names = {f"module-{module.module_id}.safetensors": module for module in ref.modules}
        specs = {
            name: module_spec(model, vocab_size, topology, module.module_id).tensors for name, module in names.items()
        }
        compose(model, vocab_size, topology, files)  # refuses files that are not these modules
        for name, module in names.items():
            _link_or_copy(self.linked[module.blob.digest], folder / name, of_ours=self.folder)
            self.linked[module.blob.digest] = folder / name
        export_modules(folder, model, vocab_size, specs, self._tokenizer())
        return {name: module.blob.digest for name, module in names.items()}

    def _write_gguf(self, folder: Path, ref: PathRef, path_id: str, vocabulary: GgufVocabulary) -> None:
        model = self.snapshot.config.experiment.model
        file = gguf_file_name(path_id)
        write_gguf(
            folder / file, model, compose(*self._composing(ref)), vocabulary, f"{self.snapshot.config.name} {path_id}"
        )
        lines = [
            "# A base model: the prompt goes to it as it is, without a template.",
            f"FROM ./{file}",
            'TEMPLATE """{{ .Prompt }}"""',
            f"PARAMETER num_ctx {model.sequence_length}",
        ]
        (folder / "Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def _write_router(self, texts: tuple[TextOfPath, ...]) -> None:
        self.say("the router and its base")
        opened = open_router(self.snapshot)
        folder, base = self.folder / ROUTER_FOLDER, self.snapshot.base_modules()
        model, vocab_size = self.snapshot.config.experiment.model, self.snapshot.vocab_size
        files = {module_id: path for module_id, (_, path) in base.items()}
        tensors = compose(model, vocab_size, self.snapshot.plan.dense, files)
        export_path(folder, model, vocab_size, tensors, self._tokenizer())
        topology = self.snapshot.topology
        paths = [topology.path_id(path_index) for path_index in range(topology.num_paths)]
        write_router(folder, opened.frozen, paths, {text.path: text.domains for text in texts})

    def _manifest(self, exported: dict[str, ExportedPath], router: str | None) -> Manifest:
        experiment = self.snapshot.config.experiment
        levels = experiment.topology.levels
        if self._model == BASE:
            levels = [level.model_copy(update={"modules": 1}) for level in levels]
        return Manifest(
            dipaco_export=1,
            run=self.snapshot.config.name,
            format=self.wish.file_format,
            version=self.wish.version,
            topology=TopologyConfig(levels=levels),
            sequence_length=experiment.model.sequence_length,
            prefix_tokens=experiment.sharding.prefix_tokens,
            router=router,
            paths=exported,
        )


def _link_or_copy(source: Path, target: Path, *, of_ours: Path) -> None:
    """A second name for a file of this export; a copy of one of the run, and where the file system has no links."""
    if of_ours in source.parents:
        try:
            os.link(source, target)
            return
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
    shutil.copyfile(source, target)


def _bytes_on_disk(folder: Path) -> int:
    """Of all files, each counted once however many names it has."""
    sizes = {}
    for file in folder.rglob("*"):
        if file.is_file():
            status = file.stat()
            sizes[status.st_ino] = status.st_size
    return sum(sizes.values())
