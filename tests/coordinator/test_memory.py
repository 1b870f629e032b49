"""Estimates of what a task needs: above what is certain, and growing with what they are made of."""

from __future__ import annotations

from configs.schema import InnerConfig, ModelConfig
from coordinator.memory import evaluate_bytes, featurize_bytes, train_bytes

MODEL = ModelConfig(blocks=4, hidden_size=64, heads=4, intermediate_size=192, sequence_length=256)

# By hand: 4 blocks of 4*64*64 + 3*64*192 + 2*64, embedding 1024*64, final norm 64.
PARAMETERS = 4 * (4 * 64 * 64 + 3 * 64 * 192 + 2 * 64) + 1024 * 64 + 64


def test_training_holds_parameters_gradients_both_moments_and_the_start() -> None:
    wide = MODEL.model_copy(update={"hidden_size": 1024, "intermediate_size": 4096, "head_size": 256})
    deeper = wide.model_copy(update={"blocks": 5})
    block = 4 * 1024 * 1024 + 3 * 1024 * 4096 + 2 * 1024
    added = train_bytes(deeper, 1024, rows=1, dtype="float32") - train_bytes(wide, 1024, rows=1, dtype="float32")
    assert 5 * 4 * block < added < 8 * 4 * block


def test_muon_spares_one_moment_of_the_matrices_and_works_on_one_of_them() -> None:
    deep = MODEL.model_copy(update={"blocks": 16})
    attention, mlp = 4 * 64 * 64, 3 * 64 * 192
    muon = train_bytes(deep, 1024, rows=1, inner=InnerConfig.model_validate({"optimizer": "muon"}))
    assert train_bytes(deep, 1024, rows=1) - muon == 4 * (16 * (attention + mlp) - 6 * 64 * 192)


def test_training_grows_by_the_activations_of_each_row() -> None:
    one, two, three = (train_bytes(MODEL, 1024, rows=rows) for rows in (1, 2, 3))
    assert two - one == three - two >= 256 * 4 * (3 * 1024 + 4 * (8 * 64 + 8 * 64 + 4 * 192))


def test_a_quickstart_task_is_measured_at_80_mb_and_estimated_above_it() -> None:
    measured = 80e6  # peak resident growth of two steps: 8 rows of 256 tokens, one CPU thread
    estimate = train_bytes(MODEL.model_copy(update={"qk_norm": True}), 1024, rows=8, device="cpu")
    assert measured < estimate < 2 * measured


def test_logits_count_only_as_far_as_they_exist_at_once() -> None:
    large, larger = (train_bytes(MODEL, vocab_size, rows=64, device="cpu") for vocab_size in (32_000, 64_000))
    assert larger - large == 32_000 * MODEL.hidden_size * (6 * 4 + 2)
    assert train_bytes(MODEL, 32_000, rows=8) > train_bytes(MODEL, 32_000, rows=8, device="cpu")


def test_checkpointing_activations_lowers_the_need_of_a_deep_model() -> None:
    deep = MODEL.model_copy(update={"blocks": 16})
    assert train_bytes(deep, 1024, rows=8, checkpoint_activations=True) < 0.5 * train_bytes(deep, 1024, rows=8)


def test_bfloat16_autocast_adds_its_copy_of_the_parameters() -> None:
    difference = train_bytes(MODEL, 1024, rows=1, dtype="bfloat16") - train_bytes(MODEL, 1024, rows=1, dtype="float32")
    assert difference == 2 * PARAMETERS
    assert train_bytes(MODEL, 1024, rows=1, dtype="auto") == train_bytes(MODEL, 1024, rows=1, dtype="bfloat16")


def test_sequence_length_defaults_to_the_models() -> None:
    assert train_bytes(MODEL, 1024, rows=1) == train_bytes(MODEL, 1024, rows=1, sequence_length=256)
    assert evaluate_bytes(MODEL, 1024, rows=1) == evaluate_bytes(MODEL, 1024, rows=1, sequence_length=256)
    assert evaluate_bytes(MODEL, 1024, rows=1, sequence_length=128) < evaluate_bytes(MODEL, 1024, rows=1)


def test_reading_needs_less_than_training() -> None:
    assert 8 * PARAMETERS < evaluate_bytes(MODEL, 1024, rows=8) < train_bytes(MODEL, 1024, rows=8)
    assert 8 * PARAMETERS < featurize_bytes(MODEL, 1024) < train_bytes(MODEL, 1024, rows=32)


def test_a_150m_path_of_the_paper_fits_a_24_gb_card_with_small_micro_batches() -> None:
    paper = ModelConfig(
        blocks=12, hidden_size=896, heads=16, head_size=64, intermediate_size=3584, sequence_length=1024
    )
    assert train_bytes(paper, 32_000, rows=8) < 24 * 1024**3
