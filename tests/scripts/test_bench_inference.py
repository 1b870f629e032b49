"""The measurement of inference, on a model that takes no time."""

from __future__ import annotations

import json

import pytest

from configs.schema import ModelConfig
from scripts import bench_inference

TINY = ModelConfig(blocks=2, hidden_size=32, heads=2, intermediate_size=48, sequence_length=128)


def test_it_gives_every_ratio(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_inference, "SIZES", {"20M": (TINY, 64)})
    arguments = ["--sizes", "20M", "--context", "8", "--tokens", "2", "--rounds", "1", "--threads", "1", "--json"]
    assert bench_inference.main(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert [result["precision"] for result in told["results"]] == ["float32", "bfloat16", "int8"]
    for result in told["results"]:
        ratios = [value for name, value in result.items() if name.endswith("_ratio")]
        assert len(ratios) == 5
        assert all(ratio > 0 for ratio in ratios)


def test_processor_time_is_of_one_thread(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_inference.main(["--clock", "processor", "--threads", "2"]) == 2
    assert "--threads 1" in capsys.readouterr().err
