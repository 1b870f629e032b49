"""How little a worker loads before its first step: on a preemptible machine every start pays for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

STEP = """
import sys
import torch
from configs.schema import InnerConfig, ModelConfig
from model.transformer import PathModel
from protocol.tasks import Numerics
from worker.inner_optimizer import InnerOptimizer
from worker.numerics import applied
import worker.train

config = ModelConfig(blocks=1, hidden_size=8, heads=2, intermediate_size=8, sequence_length=64)
with applied(Numerics()):
    path = PathModel(config, 16)
    optimizer = InnerOptimizer(dict(path.named_parameters()), InnerConfig(optimizer=sys.argv[1]))
    tokens = torch.zeros((1, 64), dtype=torch.long)
    path.loss_sum_and_count(path(tokens), tokens, tokens >= 0)[0].backward()
    optimizer.clip()
    optimizer.step(1e-3)
print([name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules])
"""


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_first_step_does_not_load_the_compiler(optimizer: str) -> None:
    told = subprocess.run(
        [sys.executable, "-c", STEP, optimizer], capture_output=True, text=True, check=True, timeout=120
    )
    assert told.stdout.strip() == "[]", "torch's compiler takes two seconds to import, and only `compile` needs it"
