"""What the router LM chooses: for every chunk the best path after the tokens before it, and nothing of what follows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from corpus.token_file import TokenFile
from model.path import load_path
from protocol.tasks import FeaturizeSpec, Numerics
from routing.records import Routes, evaluated_positions
from worker.featurize import run_featurize
from worker.task_path import topology_of

if TYPE_CHECKING:
    from tests.worker.conftest import BlobOf, MakeRun, TinyRun

P = 4


def looked(run: TinyRun, blob: BlobOf, prefix_tokens: int, **changes: Any) -> Routes:
    values = {"mode": "look", "base": run.add_modules("router", seed=3), "tokens": blob(run.tokens)}
    values |= {"prefix_tokens": prefix_tokens, "numerics": Numerics(device="cpu"), "intervals": [16, 40]}
    spec = FeaturizeSpec.model_validate(values | changes)
    outcome = run_featurize(spec, run.experiment, run.vocab_size, run.modules, run.tokens, None, run.root)
    assert outcome.result.sequences > 0
    return Routes.from_bytes(outcome.files["routes"].read_bytes())


@pytest.mark.parametrize("prefix_tokens", [32, 70])
def test_every_chunk_follows_from_the_text_before_it(make_run: MakeRun, blob: BlobOf, prefix_tokens: int) -> None:
    """Each choice against a forward pass of the tokens before its chunk alone; some prefixes are not whole."""
    run = make_run(model={"init_std": 0.5})
    record = looked(run, blob, prefix_tokens, max_sequences=9)
    router = load_path(run.experiment.model, run.vocab_size, topology_of(run.experiment, "router"), run.modules)

    def scores(tokens: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            found: np.ndarray = router.logits(router(torch.from_numpy(tokens.astype(np.int64))[None]))[
                0, -1, :P
            ].numpy()
        return found

    with TokenFile.open(run.tokens) as file:
        positions = evaluated_positions(file, 9)
        np.testing.assert_array_equal(record.positions, positions)
        for line, position in enumerate(positions):
            tokens = file.tokens(int(position))
            first = scores(tokens[: prefix_tokens + 1])
            assert record.sequence[line] == first.argmax()
            np.testing.assert_allclose(record.posterior[line], np.exp(first) / np.exp(first).sum(), atol=1e-5)
            for interval, paths in record.every.items():
                assert paths.shape[1] == -(-(127 - prefix_tokens) // interval)
                for chunk in range(paths.shape[1]):
                    first_target = prefix_tokens + 1 + chunk * interval
                    reached = first_target < len(tokens)
                    expected = scores(tokens[:first_target]).argmax() if reached else record.sequence[line]
                    assert paths[line, chunk] == expected
    assert len(np.unique(record.every[16])) == P


def test_repeats_bit_for_bit(make_run: MakeRun, blob: BlobOf) -> None:
    run = make_run()
    assert looked(run, blob, 32).to_bytes() == looked(run, blob, 32).to_bytes()
