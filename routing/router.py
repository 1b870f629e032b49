"""The router interface, the router of the features and the router LM: which path comes next, given the tokens so far.

One class serves evaluation and inference; sharding uses its frozen part directly on features that tasks have computed.

Legend: T tokens so far (BOS first), P paths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float64

from model.transformer import PathModel
from routing.features import features_of, first_prefix, prefix_before
from routing.frozen import FrozenRouter


@dataclass(frozen=True, slots=True)
class RouteState:
    """What a router remembers of a text: how many of its tokens it has routed on (0: none yet)."""

    seen_tokens: int = 0


class Router(Protocol):
    """Posterior over paths from the tokens so far. `version` changes with anything that could change a route."""

    @property
    def version(self) -> str: ...

    @property
    def num_paths(self) -> int: ...

    def route(
        self, tokens: npt.NDArray[Any], state: RouteState | None = None
    ) -> tuple[Float64[np.ndarray, " P"], RouteState]:
        """Probabilities of the paths for what follows `tokens`, and the state to pass with the next call."""
        ...


class FeatureRouter:
    """A frozen router on features of the base LM: the first prefix decides at first, the last prefix_tokens after."""

    def __init__(self, base: PathModel, frozen: FrozenRouter) -> None:
        self._base = base
        self._frozen = frozen

    @property
    def version(self) -> str:
        return self._frozen.version

    @property
    def num_paths(self) -> int:
        return self._frozen.num_paths

    def route(
        self, tokens: npt.NDArray[Any], state: RouteState | None = None
    ) -> tuple[Float64[np.ndarray, " P"], RouteState]:
        """`tokens` (T) with BOS in front. A prefix shorter than prefix_tokens is routed on as it is."""
        prefix_tokens = self._frozen.prefix_tokens
        if state is None or state.seen_tokens < prefix_tokens:
            prefix = first_prefix(tokens, prefix_tokens)
        else:
            prefix = prefix_before(tokens, len(tokens), prefix_tokens)
        posterior = self._frozen.posterior(features_of(self._base, [prefix]))[0]
        return posterior, RouteState(len(tokens) - 1)


class RouterLM:
    """The LM that was trained to name the best path for what follows (worker/objective.py): it reads all tokens so far.

    Of a text longer than its sequences it reads BOS and the newest ones.
    """

    def __init__(self, model: PathModel, num_paths: int, version: str) -> None:
        self._model = model
        self.num_paths, self.version = num_paths, version

    @torch.no_grad()
    def route(
        self, tokens: npt.NDArray[Any], state: RouteState | None = None
    ) -> tuple[Float64[np.ndarray, " P"], RouteState]:
        """`tokens` (T) with BOS in front."""
        del state
        read = np.append(tokens[:1], tokens[1:][1 - self._model.config.sequence_length :])
        hidden = self._model(torch.from_numpy(read.astype(np.int64))[None])[0, -1]
        scores = self._model.logits(hidden, self.num_paths).double()
        return scores.softmax(dim=0).numpy(), RouteState(len(tokens) - 1)


class OnePath:
    """The router of a topology with one path."""

    version = "one path"
    num_paths = 1

    def route(
        self, tokens: npt.NDArray[Any], state: RouteState | None = None
    ) -> tuple[Float64[np.ndarray, " P"], RouteState]:
        del state
        return np.ones(1), RouteState(len(tokens) - 1)
