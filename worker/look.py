"""FEATURIZE mode `look`: where the router LM would send every evaluated sequence, and each of its chunks.

It reads the whole text once, causally; after each token its scores of the paths are those of the tokens so far (DiPaCo,
2403.10616, Sec 2.4.3). Batches are those of EVALUATE.

Legend: N sequences, C chunks of an interval, B sequences of a batch, T tokens, P paths.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float32

from configs.schema import Experiment
from corpus.token_file import TokenFile
from model.transformer import PathModel
from protocol.tasks import FeaturizeSpec
from routing.records import Routes, evaluated_positions
from worker.evaluate import BATCH_SEQUENCES, batches, padded
from worker.numerics import Compute
from worker.task_path import MIXTURE, topology_of


def look(
    spec: FeaturizeSpec,
    experiment: Experiment,
    file: TokenFile,
    router: PathModel,
    compute: Compute,
    count: Callable[[list[np.ndarray]], None],
) -> Routes:
    """The routes of the file's evaluated sequences; `count` is told what was read. Ties: the lower path index.

    A chunk that a sequence does not reach has the path of its first; a shorter prefix counts as it is.
    """
    positions = evaluated_positions(file, spec.max_sequences)
    num_paths = topology_of(experiment, MIXTURE).num_paths
    length, prefix = experiment.model.sequence_length, spec.prefix_tokens
    best = np.zeros((len(positions), length), np.uint16)  # after each token
    sequence, posterior = np.zeros(len(positions), np.uint16), np.zeros((len(positions), num_paths), np.float32)
    for indices in batches(file.lengths[positions], BATCH_SEQUENCES * length):
        sequences = [file.tokens(int(positions[index])) for index in indices]
        scores = _scores(router, compute, sequences, num_paths)
        best[indices, : scores.shape[1]] = scores.argmax(axis=2)
        ends = np.minimum(prefix, file.lengths[positions[indices]].astype(np.int64) - 1)
        first = scores[np.arange(len(indices)), ends]
        sequence[indices] = first.argmax(axis=1)
        posterior[indices] = np.exp(first - np.logaddexp.reduce(first, axis=1, keepdims=True))
        count(sequences)
    lengths = file.lengths[positions][:, None]
    every = {}
    for interval in spec.intervals:
        last_read = np.arange(prefix, length - 1, interval)  # of each chunk, before its first target
        every[interval] = np.where(last_read + 1 < lengths, best[:, last_read], sequence[:, None])
    return Routes(positions.astype(np.uint32), sequence, posterior, every)


@torch.no_grad()
def _scores(
    router: PathModel, compute: Compute, sequences: list[np.ndarray], num_paths: int
) -> Float32[np.ndarray, "B T P"]:
    """Scores of the paths after every token; behind the end of a sequence they mean nothing."""
    tokens, sequence_index = (torch.from_numpy(array).to(compute.device) for array in padded(sequences))
    with compute.autocast():
        scores = router.logits(router(tokens, None, sequence_index), num_paths)
    found: np.ndarray = scores.float().cpu().numpy()
    return found
