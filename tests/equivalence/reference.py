"""What the whole system is compared with: plain training and DiLoCo as loops in one process, in plain torch.

No tasks, files, leases or modules: one tensor a name. Shared with the system are only the transformer and the rows of a
shard's step; optimizers, schedule, weights and the outer step are written out here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from configs.schema import Experiment, InnerConfig
from corpus.rows import IGNORED, Batch, batch, pack_rows
from corpus.token_file import TokenFile
from model.path import path_from_tensors

Tensors = dict[str, Tensor]
# The rows of a shard's step, counted from 0 where the shard is first trained on.
Batches = Callable[[int], Batch]


def shard_batches(files: Sequence[TokenFile], experiment: Experiment, order_seed: int) -> Batches:
    """The rows of each step of a shard whose sequences lie in these files."""
    rows = pack_rows(np.concatenate([file.lengths for file in files]), experiment.model.sequence_length)
    return lambda step: batch(files, rows, rows.batch_rows(order_seed, step, experiment.inner.batch_rows))


def learning_rate(inner: InnerConfig, step: int, total_steps: int) -> float:
    """Linear warm-up, then a cosine down to the final ratio."""
    if step < inner.warmup_steps:
        return inner.learning_rate * (step + 1) / inner.warmup_steps
    done = min(1.0, (step - inner.warmup_steps) / max(1, total_steps - inner.warmup_steps))
    floor = inner.final_learning_rate_ratio
    return inner.learning_rate * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done)))


class Loop:
    """One replica: a path, its AdamW, and the two counters (steps of the path, steps of the shard)."""

    def __init__(
        self, experiment: Experiment, vocab_size: int, start: Mapping[str, np.ndarray], batches: Batches
    ) -> None:
        inner = experiment.inner
        self.inner, self.total_steps, self.batches = inner, experiment.total_steps, batches
        self.step, self.shard_step, self.tokens, self.losses = 0, 0, 0, list[float]()
        self.path = path_from_tensors(experiment.model, vocab_size, start)
        named = dict(self.path.named_parameters())
        decay = [p for name, p in named.items() if p.ndim >= 2 and "embed_tokens" not in name]
        rest = [p for name, p in named.items() if p.ndim < 2 or "embed_tokens" in name]
        groups = [{"params": decay, "weight_decay": inner.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, betas=(inner.beta1, inner.beta2), eps=inner.eps, fused=True)

    def fork(self, batches: Batches) -> Loop:
        """A replica that goes on from here on a shard of its own."""
        other = copy.copy(self)
        other.path, other.adamw = copy.deepcopy((self.path, self.adamw))
        other.batches, other.shard_step, other.tokens, other.losses = batches, 0, 0, []
        if self.inner.fork_inner_state == "reset":
            other.adamw.state.clear()
        return other

    def tensors(self) -> Tensors:
        return {name: parameter.detach() for name, parameter in self.path.named_parameters()}

    def train(self, steps: int) -> None:
        """Inner steps (DiLoCo, 2311.08105, Algorithm 1, lines 4-7)."""
        if self.inner.inner_state == "reset":
            self.adamw.state.clear()
        for _ in range(steps):
            rows = self.batches(self.shard_step)
            targets = torch.from_numpy(rows.targets())
            hidden = self.path(*map(torch.from_numpy, (rows.tokens, rows.positions, rows.sequence_index)))
            loss_sum, count = self.path.loss_sum_and_count(hidden, targets, targets != IGNORED)
            self.adamw.zero_grad()
            (loss_sum / count).backward()  # type: ignore[no-untyped-call]
            if self.inner.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.path.parameters(), self.inner.clip_norm)
            for group in self.adamw.param_groups:
                group["lr"] = learning_rate(self.inner, self.step, self.total_steps)
            self.adamw.step()
            self.step, self.shard_step, self.tokens = self.step + 1, self.shard_step + 1, self.tokens + count
            self.losses.append(float(loss_sum.detach()) / count)


def plain_training(loop: Loop, steps: int) -> Tensors:
    """The parameters after `steps` further steps."""
    loop.train(steps)
    return loop.tensors()


def diloco(
    base: Loop, shards: Sequence[tuple[Batches, int]], experiment: Experiment, phases: int, inner_steps: int
) -> Tensors:
    """The shared parameters after `phases` outer steps over one replica a shard; `shards`: batches, training tokens."""
    shared = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in base.tensors().items()}
    outer = torch.optim.SGD(
        shared.values(), lr=experiment.outer.learning_rate, momentum=experiment.outer.momentum, nesterov=True
    )
    scale = math.sqrt(len(shards)) if experiment.outer.rescale == "sqrt" else 1.0
    replicas = [base.fork(batches) for batches, _ in shards]
    weights = [scale * tokens / sum(tokens for _, tokens in shards) for _, tokens in shards]
    for _ in range(phases):
        for replica in replicas:
            replica.path.load_state_dict(shared)
            replica.train(inner_steps)
        ends = [replica.tensors() for replica in replicas]
        for name, parameter in shared.items():
            start = parameter.detach()
            parameter.grad = torch.stack([w * (start - end[name]) for w, end in zip(weights, ends, strict=True)]).sum(0)
        outer.step()
    return {name: parameter.detach() for name, parameter in shared.items()}
