"""The forward pass against its definition: packing, losses, norms, gradients (transformers: test_hugging_face)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from configs.schema import ModelConfig
from model import linear_cross_entropy
from model.path import load_path
from model.rms_norm import RMSNorm
from model.topology import Topology
from model.transformer import PathModel
from tests.model.conftest import TWO_BY_TWO, VOCAB_SIZE, tiny_model, topology

WriteModules = Callable[[ModelConfig, Topology], dict[str, Path]]


@pytest.fixture(params=[{}, {"kv_heads": 2, "qk_norm": True}, {"tie_embeddings": False, "head_size": 16}])
def path(request: pytest.FixtureRequest, write_modules: WriteModules) -> PathModel:
    model, grid = tiny_model(**request.param), topology(TWO_BY_TWO)
    files = write_modules(model, grid)
    return load_path(model, VOCAB_SIZE, grid, {module_id: files[module_id] for module_id in grid.modules_of_path(2)})


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(length))


def test_a_packed_row_is_its_sequences_run_alone(path: PathModel) -> None:
    lengths = [[5, 9, 10], [20, 3]]
    row = tokens(2, 24)
    index = torch.full((2, 24), -1)
    positions = torch.zeros(2, 24, dtype=torch.int64)
    for place, parts in enumerate(lengths):
        begin = 0
        for number, length in enumerate(parts):
            index[place, begin : begin + length] = number
            positions[place, begin : begin + length] = torch.arange(length)
            begin += length
    packed = path(row, positions, index)
    assert packed.isfinite().all()
    for place, parts in enumerate(lengths):
        begin = 0
        for length in parts:
            alone = path(row[place : place + 1, begin : begin + length])
            torch.testing.assert_close(packed[place : place + 1, begin : begin + length], alone, atol=1e-5, rtol=0)
            begin += length


def test_padding_after_one_sequence_changes_nothing(path: PathModel) -> None:
    row = tokens(2, 12)
    index = torch.zeros(2, 12, dtype=torch.int64)
    index[1, 7:] = -1
    positions = torch.arange(12).repeat(2, 1)
    found = path(row, positions, index)
    torch.testing.assert_close(found[1:, :7], path(row[1:, :7]), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[:1], path(row[:1]), atol=1e-5, rtol=0)


def test_later_tokens_change_nothing_before_them(path: PathModel) -> None:
    row = tokens(1, 12)
    other = row.clone()
    other[0, 8:] = (other[0, 8:] + 1) % VOCAB_SIZE
    found, changed = path(row), path(other)
    torch.testing.assert_close(found[:, :8], changed[:, :8], atol=1e-6, rtol=0)
    assert (found[:, 8:] - changed[:, 8:]).abs().amax(-1).min() > 1e-3


def test_the_loss_and_its_gradient_are_those_of_the_definition(
    path: PathModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(linear_cross_entropy._CHUNK_ELEMENTS, "cpu", 16 * VOCAB_SIZE)  # several chunks
    row, targets = tokens(3, 20), tokens(3, 20).roll(5, 1)
    counted = torch.rand(3, 20, generator=torch.Generator().manual_seed(0)) < 0.8
    loss, count = path.loss_sum_and_count(path(row), targets, counted)
    found = torch.autograd.grad(loss / count, list(path.parameters()))
    hidden = path(row)
    reference = F.cross_entropy(path.logits(hidden)[counted], targets[counted], reduction="sum")
    expected = torch.autograd.grad(reference / counted.sum(), list(path.parameters()))
    assert count == int(counted.sum())
    torch.testing.assert_close(loss, reference, atol=1e-4, rtol=1e-6)
    for gradient, definition in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, definition, atol=1e-5, rtol=1e-4)
    single = path.token_losses(hidden[counted], targets[counted])
    torch.testing.assert_close(single.sum(), reference, atol=1e-4, rtol=1e-6)


def test_no_counted_target_is_no_loss(path: PathModel) -> None:
    row = tokens(1, 8)
    loss, count = path.loss_sum_and_count(path(row), row, torch.zeros(1, 8, dtype=torch.bool))
    assert (loss.item(), count) == (0.0, 0)
    loss.backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("shape", [(5, 3, 32), (2, 3, 4, 8)])
def test_the_norm_and_its_derivative_are_torchs(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(shape[-1], 1e-5)
    norm.weight.data = torch.randn(shape[-1], generator=generator)
    x = torch.randn(shape, generator=generator).transpose(0, 1).requires_grad_()
    out = torch.randn(x.shape, generator=generator)
    expected = F.rms_norm(x, shape[-1:], norm.weight, 1e-5)
    torch.testing.assert_close(norm(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(norm(x), expected)
    found = torch.autograd.grad(norm(x), (x, norm.weight), out)
    for gradient, definition in zip(found, torch.autograd.grad(expected, (x, norm.weight), out), strict=True):
        torch.testing.assert_close(gradient, definition, atol=1e-5, rtol=1e-4)


def test_activation_checkpoints_change_no_bit(path: PathModel) -> None:
    row = tokens(2, 16)
    gradients = []
    for path.checkpoint_activations in (False, True):
        loss, count = path.loss_sum_and_count(path(row), row.roll(-1, 1), torch.ones(2, 16, dtype=torch.bool))
        gradients.append(torch.autograd.grad(loss / count, list(path.parameters())))
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))


def test_bfloat16_autocast_stays_near_float32(path: PathModel) -> None:
    row = tokens(2, 16)
    counted = torch.ones(2, 16, dtype=torch.bool)
    exact, count = path.loss_sum_and_count(path(row), row, counted)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = path.loss_sum_and_count(path(row), row, counted)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.dtype == torch.float32
    assert abs(loss.item() - exact.item()) / count < 0.05
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in path.parameters())


def test_block_states_are_hidden_states_before_the_norm(path: PathModel) -> None:
    row = tokens(1, 10)
    torch.testing.assert_close(path.final_norm(path.block_states(row)), path(row))


def test_more_tokens_than_positions_are_refused(path: PathModel) -> None:
    with pytest.raises(ValueError, match=r"65 tokens exceed model\.sequence_length \(64\)"):
        path(tokens(1, 65))


def test_golden_loss(write_modules: WriteModules) -> None:
    """A change of this number is a change of the numerics version."""
    model, grid = tiny_model(qk_norm=True, kv_heads=2), topology(TWO_BY_TWO)
    files = write_modules(model, grid)
    path = load_path(model, VOCAB_SIZE, grid, {"0.0": files["0.0"], "1.1": files["1.1"]})
    row = (torch.arange(2 * 16).view(2, 16) * 7) % VOCAB_SIZE
    loss, count = path.loss_sum_and_count(path(row), row.roll(-1, 1), torch.ones(2, 16, dtype=torch.bool))
    assert loss.item() / count == pytest.approx(4.284073, abs=2e-5)
