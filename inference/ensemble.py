"""Generation by several paths at once: the mixture that evaluation's `ensemble:N` measures, drawn from token by token.

The members are the N paths with the highest posterior after the prefix; each is weighted by it and by how well it has
explained the tokens since (routing/prediction.py). A text needs a context, and a step, of every member.

Legend: K members, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Float64

from inference.context import Context
from inference.engine import Finish, GeneratedToken, Request, window
from inference.path_source import PathSource
from inference.sampling import Sampler
from routing.prediction import SMALLEST_PRIOR
from routing.router import Router


class Ensemble:
    """The paths of one model, mixed `num_paths` at a time."""

    def __init__(
        self, paths: PathSource, router: Router, prefix_tokens: int, bos_id: int, eos_id: int, num_paths: int
    ) -> None:
        self._paths, self._router = paths, router
        self._prefix_tokens, self._bos_id, self._eos_id = prefix_tokens, bos_id, eos_id
        self._num_paths = num_paths

    def generate(self, request: Request) -> Iterator[GeneratedToken]:
        """The tokens that follow the prompt, each with the member that weighed most; past a sequence the text slides.

        `every`, `path` and `by_router_lm` of the request mean nothing here.
        """
        sampler = Sampler(request.sampling)
        stream = [self._bos_id, *request.prompt]
        mixture = self._mixture(stream)
        for count in range(1, request.max_tokens + 1):
            if len(stream) - 1 == self._prefix_tokens and count > 1:
                mixture = self._mixture(stream)  # a short prompt was routed as it was
            token = sampler.choose(mixture.scores())
            stream.append(token)
            ended = token == self._eos_id
            finish: Finish | None = "stop" if ended else "length" if count == request.max_tokens else None
            yield GeneratedToken(token, mixture.heaviest, finish)
            if finish is not None:
                return
            mixture.read(token)

    def _mixture(self, stream: Sequence[int]) -> _Mixture:
        """The members for a text, and what they make of it so far."""
        prefix = np.asarray(stream[: self._prefix_tokens + 1], np.int64)
        posterior, _ = self._router.route(prefix)
        members = np.argsort(-posterior, kind="stable")[: self._num_paths]
        log_weights = np.log(np.maximum(posterior[members].astype(np.float64), SMALLEST_PRIOR))
        return _Mixture(self._paths, members.tolist(), log_weights, stream, len(prefix))


class _Mixture:
    """The members, their contexts, and the logarithm of their weights, up to a constant."""

    def __init__(
        self,
        paths: PathSource,
        members: Sequence[int],
        log_weights: Float64[np.ndarray, " K"],
        stream: Sequence[int],
        counted_from: int,
    ) -> None:
        """`counted_from`: the first position of the stream that tells one member from another."""
        self._members, self._log_weights = members, log_weights
        self._sequence_length = paths.config.sequence_length
        self._contexts = [self._opened(paths, member) for member in members]
        kept = window(stream, self._sequence_length)
        begin = len(kept) - len(stream) + counted_from  # of a text that has slid, only what is still read is counted
        for context in self._contexts:
            context.read(kept[: max(1, begin)])
        for token in kept[max(1, begin) :]:
            self.read(token)

    @staticmethod
    def _opened(paths: PathSource, member: int) -> Context:
        context = paths.context()
        context.use(*paths.modules(member))
        return context

    @property
    def heaviest(self) -> int:
        """The path index of the member with the greatest weight."""
        return self._members[int(np.argmax(self._log_weights))]

    def scores(self) -> Float[np.ndarray, " V"]:
        """The logarithm of the mixture's probabilities of the next token, up to a constant."""
        mixed: np.ndarray = np.logaddexp.reduce(self._log_weights[:, None] + self._log_probabilities(), axis=0)
        return mixed

    def read(self, token: int) -> None:
        """Append a token: who expected it gains weight."""
        self._log_weights = self._log_weights + self._log_probabilities()[:, token]
        self._log_weights -= self._log_weights.max()
        for context in self._contexts:
            if context.length < self._sequence_length:
                context.read([token])
            else:
                context.restart(window([*context.tokens, token], self._sequence_length))

    def _log_probabilities(self) -> Float64[np.ndarray, "K V"]:
        logits = np.stack([context.logits().astype(np.float64) for context in self._contexts])
        logits -= logits.max(axis=1, keepdims=True)
        normalised: np.ndarray = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return normalised
