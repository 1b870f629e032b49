from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from configs.schema import LevelConfig
from tests.inference.conftest import Mixture

TOKENS = [0, 7, 3, 22, 9, 9, 31, 2, 17, 5]
THREE_LEVELS = [
    LevelConfig(modules=1, blocks=[3], embedding=True),
    LevelConfig(modules=2, blocks=[1, 2]),
    LevelConfig(modules=2, blocks=[0], head=True),
]
HEAD_ALONE = [LevelConfig(modules=1, blocks=[0, 1, 2, 3], embedding=True), LevelConfig(modules=3, head=True)]


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("sizes", [[10], [1] * 10, [3, 4, 1, 2]])
def test_reading_in_pieces_is_a_plain_forward_pass(mixture: Mixture, sizes: list[int]) -> None:
    source = mixture.source()
    context = source.context()
    context.use(*source.modules(3))
    begin = 0
    for size in sizes:
        context.read(TOKENS[begin : begin + size])
        begin += size
        close(context.logits(), mixture.logits(3, TOKENS[:begin]))


@pytest.mark.parametrize(
    ("levels", "old", "new", "first"),
    [
        (None, 0, 1, 2),
        (None, 1, 3, 0),
        (None, 2, 2, None),
        (THREE_LEVELS, 0, 1, 0),
        (THREE_LEVELS, 0, 2, 1),
        (HEAD_ALONE, 0, 2, None),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_a_switch_runs_again_only_what_changed(
    make_mixture: Callable[..., Mixture],
    levels: list[LevelConfig] | None,
    old: int,
    new: int,
    first: int | None,
    tied: bool,
) -> None:
    mixture = make_mixture(levels, tie_embeddings=tied)
    source = mixture.source()
    context = source.context()
    context.use(*source.modules(old))
    context.read(TOKENS[:6])
    context.read(TOKENS[6:8])
    before = context.computed_blocks
    assert context.use(*source.modules(new)) == first
    assert context.computed_blocks - before == (0 if first is None else 8 * (4 - first))
    close(context.logits(), mixture.logits(new, TOKENS[:8]))
    context.read(TOKENS[8:])
    close(context.logits(), mixture.logits(new, TOKENS))
    context.use(*source.modules(old))
    close(context.logits(), mixture.logits(old, TOKENS))


def test_modules_of_equal_bytes_are_no_switch(mixture: Mixture) -> None:
    mixture.digests["1.1"] = mixture.digests["1.0"]
    source = mixture.source()
    context = source.context()
    context.use(*source.modules(0))
    context.read(TOKENS)
    assert context.use(*source.modules(1)) is None


def test_restart_forgets(mixture: Mixture) -> None:
    source = mixture.source()
    context = source.context()
    context.use(*source.modules(0))
    context.read(TOKENS)
    context.restart(TOKENS[:4])
    assert context.tokens == tuple(TOKENS[:4])
    close(context.logits(), mixture.logits(0, TOKENS[:4]))
