from __future__ import annotations

from pathlib import Path

import pytest

from configs.load import load_config
from dipaco.ending import Refused
from dipaco.lengthening import lengthened, phase_s

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def test_a_run_lasts_until_the_last_kill_that_is_asked_for() -> None:
    config = load_config(CONFIGS / "simulate.yaml")
    [train] = config.experiment.trains
    times = [30.0 * count for count in range(1, 20)]
    longer = lengthened(config, 10.0, [(times, 3), (times, 10)])
    assert longer.experiment.trains == [train.model_copy(update={"phases": 30})]
    assert lengthened(config, 10.0, [(times, 0)]) == config
    assert lengthened(config, 1000.0, [(times, 3)]) == config, "it is long enough already"


def test_a_plan_with_too_few_kills_is_refused() -> None:
    config = load_config(CONFIGS / "simulate.yaml")
    with pytest.raises(Refused, match="has 1 kills"):
        lengthened(config, 10.0, [([1.0], 2)])


def test_a_phase_takes_as_many_waves_as_it_has_tasks_for_a_core() -> None:
    config = load_config(CONFIGS / "simulate.yaml")
    assert phase_s(config, 3, 2) == phase_s(config, 2, 8) == pytest.approx(4 * phase_s(config, 8, 8))
