"""A gateway in the process of a test: a router artefact over bytes on disk, its loop in a thread, its port free."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from corpus.tokenizer import byte_tokenizer
from dipaco.gateway import GatewayOffer, gateway_until
from dipaco.serving import Signals
from inference.gateway import Gateway
from inference.server import Doors, OpenDoors
from model.checkpoint_files import CheckpointTokenizer
from model.hugging_face import export_path
from model.initial import write_initial_module
from model.layout import module_spec
from model.path import compose, load_path
from routing.artefact import RouterArtefact, one_module, write_router
from routing.clusters import Clusters, Group
from routing.features import features_of, first_prefix
from tests.inference.fake_backend import FakeBackend
from tests.inference.served_thread import ServedThread
from tests.inference.text_server import PREFIX_TOKENS, SHAPE

PATHS = ("0.0", "0.1", "1.0", "1.1")
PROMPTS = ("stir the onions", "def return self", "whereas the party", "12.5 0.0031 77")
"""A text of every path, in their order."""
SPREAD = 3.0  # how far apart the paths are: posteriors are neither 0 nor 1


def make_router(folder: Path) -> Path:
    """A router artefact whose clusters have their centres where PROMPTS lie."""
    folder.mkdir()
    tokenizer, topology = byte_tokenizer(), one_module(SHAPE)
    file = folder.parent / f"{folder.name}-module"
    write_initial_module(file, module_spec(SHAPE, tokenizer.vocab_size, topology, "0.0"), SHAPE, 7)
    files = {"0.0": file}
    named = CheckpointTokenizer(tokenizer.to_bytes(), tokenizer.bos_id, tokenizer.eos_id)
    export_path(folder, SHAPE, tokenizer.vocab_size, compose(SHAPE, tokenizer.vocab_size, topology, files), named)
    base = load_path(SHAPE, tokenizer.vocab_size, topology, files)
    prompts = [np.array([tokenizer.bos_id, *tokenizer.encode(prompt)]) for prompt in PROMPTS]
    z = features_of(base, [first_prefix(tokens, PREFIX_TOKENS) for tokens in prompts]).astype(np.float64)
    scale = SPREAD / np.sqrt(((z - z.mean(0)) ** 2).sum(1).mean())
    centres = (z - z.mean(0)) * scale
    size = SHAPE.hidden_size
    frozen = Clusters(z.mean(0), np.eye(size) * scale, (Group(np.arange(size), centres),), 1, PREFIX_TOKENS)
    write_router(folder, frozen, PATHS, {})
    return folder


def ranked(artefact: RouterArtefact, prompt: str) -> list[str]:
    """The paths by posterior, as the artefact itself has them."""
    tokens = np.array([artefact.tokenizer.bos_id, *artefact.tokenizer.encode(prompt)])
    posterior, _ = artefact.router.route(tokens)
    return [PATHS[index] for index in np.argsort(-posterior, kind="stable")]


class GatewayServer(ServedThread):
    """Open while it is entered, in front of `backends` by path."""

    def __init__(
        self,
        router: Path,
        backends: dict[str, FakeBackend],
        file: Path,
        offer: dict[str, Any] | None = None,
        keys: dict[str, Path] | None = None,
        authority: Path | None = None,
        doors: dict[str, Any] | None = None,
        **patience: float,
    ) -> None:
        super().__init__()
        written: dict[str, Any] = {
            path: {"url": backend.url, "model": backend.model} for path, backend in backends.items()
        }
        for path, key in (keys or {}).items():
            written[path]["api_key_file"] = str(key)
        for backend in written.values() if authority is not None else ():
            backend["ca_file"] = str(authority)
        file.write_text(yaml.safe_dump({"backends": written, **patience}), encoding="utf-8")
        self.said: list[str] = []
        self.opened: OpenDoors
        self.gateway: Gateway
        self._router, self._offer = router, GatewayOffer(config=file, name="mix", **(offer or {}))
        self._doors = Doors(**{"http": "127.0.0.1:0", **(doors or {})})

    @property
    def url(self) -> str:
        return f"http://{self.opened.http}/v1"

    def __str__(self) -> str:
        return f"a gateway that said {self.said}"

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._signals.hear)

    def cut(self) -> None:
        self.stop()

    async def serve(self) -> None:
        self._loop, self._signals = asyncio.get_running_loop(), Signals()

        def ready(opened: OpenDoors, gateway: Gateway) -> None:
            self.opened, self.gateway = opened, gateway
            self.ready.set()

        self.whole = await gateway_until(self._signals, self._router, self._doors, self._offer, self.said.append, ready)
