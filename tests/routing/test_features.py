"""Features depend on the prefix and on nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from configs.schema import ModelConfig
from model.transformer import PathModel
from routing.features import BATCH_SEQUENCES, features_of, first_prefix, prefix_before, prefix_features

PREFIX = 8
CONFIG = ModelConfig(blocks=2, hidden_size=16, heads=2, intermediate_size=24, sequence_length=64)


@pytest.fixture(scope="module")
def base() -> PathModel:
    generator = torch.Generator().manual_seed(0)
    model = PathModel(CONFIG, 40).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return model


def sequences(count: int = 20, shortest: int = 1) -> list[np.ndarray]:
    """Token sequences, BOS (0) first, of many lengths."""
    generator = np.random.default_rng(4)
    lengths = generator.integers(shortest, 40, count)
    return [np.concatenate([[0], generator.integers(2, 40, length - 1)]).astype(np.uint16) for length in lengths]


@torch.no_grad()
def test_features_are_the_mean_of_the_last_block_without_bos(base: PathModel) -> None:
    tokens = torch.tensor([[0, 5, 7, 9], [0, 3, 3, 3]])
    states = base.block_states(tokens)
    assert torch.allclose(prefix_features(base, tokens), (states[:, 1] + states[:, 2] + states[:, 3]) / 3, atol=1e-6)


def test_features_do_not_depend_on_what_follows_or_stands_beside(base: PathModel) -> None:
    texts = sequences()
    together = features_of(base, [first_prefix(text, PREFIX) for text in texts])
    for text, z in zip(texts, together, strict=True):
        other = np.concatenate([text[: PREFIX + 1], np.array([1, 2, 3], np.uint16)])
        if len(text) > PREFIX:
            assert features_of(base, [first_prefix(other, PREFIX)])[0] == pytest.approx(z, abs=1e-5)
        else:
            assert features_of(base, [text])[0] == pytest.approx(z, abs=1e-5)


def test_more_prefixes_than_a_batch_keep_their_order(base: PathModel) -> None:
    prefixes = [first_prefix(text, PREFIX) for text in sequences(2 * BATCH_SEQUENCES + 3, PREFIX + 1)]
    backwards = features_of(base, prefixes[::-1])[::-1]
    together = features_of(base, prefixes)
    assert together == pytest.approx(backwards, abs=1e-5)
    for place in (0, BATCH_SEQUENCES, len(prefixes) - 1):
        assert features_of(base, prefixes[place : place + 1])[0] == pytest.approx(together[place], abs=1e-5)


def test_the_tokens_of_the_prefix_change_the_features(base: PathModel) -> None:
    text = sequences(1, 30)[0]
    changed = text.copy()
    changed[PREFIX] = (text[PREFIX] + 1) % 40
    z = features_of(base, [first_prefix(text, PREFIX), first_prefix(changed, PREFIX)])
    assert not np.allclose(z[0], z[1], atol=1e-4)


def test_bos_alone_has_features(base: PathModel) -> None:
    assert np.isfinite(features_of(base, [np.array([0])])).all()


def test_no_prefixes_have_no_features(base: PathModel) -> None:
    assert features_of(base, []).shape == (0, 16)


@pytest.mark.parametrize(
    ("position", "expected"), [(1, [0]), (3, [0, 11, 12]), (9, [0, *range(11, 19)]), (12, [0, *range(14, 22)])]
)
def test_the_prefix_before_a_chunk_is_bos_and_the_last_tokens(position: int, expected: list[int]) -> None:
    tokens = np.array([0, *range(11, 30)])
    assert prefix_before(tokens, position, PREFIX).tolist() == expected


def test_the_first_chunk_sees_the_first_prefix() -> None:
    tokens = np.array([0, *range(11, 30)])
    assert np.array_equal(prefix_before(tokens, PREFIX + 1, PREFIX), first_prefix(tokens, PREFIX))
