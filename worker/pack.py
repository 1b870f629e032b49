"""PACK: documents to sequences of tokens, and the sequences of one shard gathered into one token file. Torch-free."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from configs.schema import Experiment
from corpus.builder import gather_sequences, tokenize_range
from corpus.token_file import TokenFile
from corpus.tokenizer import Tokenizer
from protocol.tasks import MalformedMessage, PackSpec, TaskResult
from routing.records import ShardManifest
from worker.outcome import TaskOutcome, blob_of

TOKENS = "tokens"


def run_pack(
    spec: PackSpec,
    experiment: Experiment,
    tokenizer_path: Path | None,
    text_path: Path | None,
    token_paths: Sequence[Path],
    manifest_path: Path | None,
    out_dir: Path,
) -> TaskOutcome:
    """Run the task; its one output is `tokens`. In the result, `tokens` counts all tokens of the file, BOS included.

    `tokenize` reads `tokenizer_path` and `text_path`, `gather` the other two. Raises MalformedMessage where they miss,
    and what the corpus and the manifest raise for malformed files.
    """
    begin = time.monotonic()
    out_path = out_dir / TOKENS
    if spec.mode == "tokenize":
        if tokenizer_path is None or text_path is None:
            raise MalformedMessage("a PACK task of mode 'tokenize' needs a tokenizer and a text range")
        tokenizer = Tokenizer.from_file(tokenizer_path)
        tokenize_range(text_path, tokenizer, experiment.model.sequence_length, spec.range_index, out_path)
    else:
        if manifest_path is None:
            raise MalformedMessage("a PACK task of mode 'gather' needs the manifest of its shard")
        gather_sequences(token_paths, ShardManifest.from_bytes(manifest_path.read_bytes()).ids, out_path)
    with TokenFile.open(out_path) as file:
        tokens, sequences = file.num_tokens, file.count
    result = TaskResult(
        outputs={TOKENS: blob_of(out_path)}, tokens=tokens, sequences=sequences, seconds=time.monotonic() - begin
    )
    return TaskOutcome({TOKENS: out_path}, result)
