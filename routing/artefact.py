"""The router artefact: what it takes to route text without its run, in one directory.

A Hugging Face checkpoint directory of the base LM with its tokenizer, router.msgpack (the frozen router's own form) and
router.json: what kind of router it is, the ids of the paths, and the SHA-256 of every other file that routing reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.schema import ModelConfig
from corpus.tokenizer import Tokenizer
from model import tensor_file
from model.checkpoint_files import CONFIG, TOKENIZER, WEIGHTS, write_json
from model.hugging_face import model_of
from model.layout import path_tensors
from model.path import path_from_tensors
from model.store import file_digest
from model.topology import Level, Topology
from model.transformer import PathModel
from routing.frozen import FrozenRouter, read_router
from routing.router import FeatureRouter

ROUTER, FROZEN = "router.json", "router.msgpack"
FORMAT = 1
_READ = (CONFIG, WEIGHTS, TOKENIZER, FROZEN)


class BadArtefact(ValueError):
    """A directory that holds no router, or one whose files were changed."""


@dataclass(frozen=True, slots=True)
class RouterArtefact:
    """An opened router: `paths` are the ids that its posterior is over, `domains` what each was trained on."""

    base: PathModel
    frozen: FrozenRouter
    tokenizer: Tokenizer
    paths: tuple[str, ...]
    domains: Mapping[str, Mapping[str, float]]

    @property
    def router(self) -> FeatureRouter:
        return FeatureRouter(self.base, self.frozen)

    @classmethod
    def open(cls, directory: Path) -> RouterArtefact:
        """Read and verify a directory; raises BadArtefact, IncompatibleCheckpoint, BadTokenizer, MalformedRecord."""
        described = _described(directory)
        model, vocab_size = model_of(directory)
        specs = path_tensors(model, vocab_size, one_module(model))
        base = path_from_tensors(model, vocab_size, tensor_file.read(directory / WEIGHTS, specs))
        frozen = read_router((directory / FROZEN).read_bytes())
        if frozen.num_paths != len(described["paths"]):
            raise BadArtefact(
                f"{directory / ROUTER} names {len(described['paths'])} paths, its router has {frozen.num_paths}"
            )
        return cls(
            base=base.eval().requires_grad_(False),
            frozen=frozen,
            tokenizer=Tokenizer.from_file(directory / TOKENIZER),
            paths=tuple(described["paths"]),
            domains=described["domains"],
        )


def one_module(model: ModelConfig) -> Topology:
    """The topology of a whole path in one file."""
    level = Level(0, 1, tuple(range(model.blocks)), embedding=True, head=True, per_path=False)
    return Topology((level,))


def write_router(
    directory: Path, frozen: FrozenRouter, paths: Sequence[str], domains: Mapping[str, Mapping[str, float]]
) -> None:
    """Add the router's files to the checkpoint directory of its base LM (`model.hugging_face.export_path`)."""
    (directory / FROZEN).write_bytes(frozen.to_bytes())
    described = {
        "format": FORMAT,
        "kind": type(frozen).__name__.lower(),
        "version": frozen.version,
        "prefix_tokens": frozen.prefix_tokens,
        "paths": list(paths),
        "domains": {path: dict(shares) for path, shares in domains.items()},
        "sha256": {name: file_digest(directory / name)[0] for name in _READ},
    }
    write_json(directory / ROUTER, described)


def _described(directory: Path) -> dict[str, Any]:
    """router.json, after the files that it names were held against their digests."""
    file = directory / ROUTER
    try:
        described: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if described["format"] != FORMAT:
            raise BadArtefact(f"{file} has format {described['format']}, this version of dipaco reads {FORMAT}")
        digests = {name: described["sha256"][name] for name in _READ}
        described["paths"], described["domains"] = list(described["paths"]), dict(described["domains"])
    except FileNotFoundError:
        raise BadArtefact(
            f"{directory} holds no router ({ROUTER}); `dipaco export RUN --router OUT` makes one"
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, BadArtefact):
            raise
        raise BadArtefact(f"{file} is not the description of a router: {error!r}") from None
    for name, digest in digests.items():
        if file_digest(directory / name)[0] != digest:
            raise BadArtefact(f"{directory / name} is not the file that {ROUTER} was written with; export it again")
    return described
