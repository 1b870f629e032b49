"""How fast paths answer, as ratios within one run: against the memory's speed, transformers, and other ways to batch.

A 2x2 of random modules is written to a scratch store. Every number is the best of several interleaved rounds:
    single    decoding one text, against reading its path's weights once a token (the floor: a sum, same threads)
    generate  a whole text with transformers, against the same text with this engine
    batch     16 texts over 4 paths, batched by module, against one text and against batching by path alone
    switch    going on under a path that shares the first level, against reading all of the context again
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from configs.schema import LevelConfig, ModelConfig, TopologyConfig
from inference.engine import Request
from inference.module_cache import ModuleCache
from inference.path_source import PathSource
from inference.precision import Precision, check_precision
from inference.resident_modules import ResidentModules
from inference.sampling import Sampling
from inference.schedule import BatchLimits
from inference.stepper import Stepper
from inference.stream import Reading, Served, Stream
from model import tensor_file
from model.layout import module_spec, num_parameters
from model.store import BlobStore
from model.topology import Topology
from routing.router import OnePath

SIZES = {
    "20M": (ModelConfig(blocks=8, hidden_size=384, heads=6, intermediate_size=1280, sequence_length=1024), 8192),
    "150M": (ModelConfig(blocks=12, hidden_size=896, heads=14, intermediate_size=2400, sequence_length=1024), 32000),
}
TEXTS, PATHS = 16, 4
SWITCH_TOKENS = 512
READING = Reading(32, bos_id=0, eos_id=-1)
Timed = dict[str, Callable[[], float]]


@dataclass(frozen=True, slots=True)
class Result:
    """One model in one precision; milliseconds are per token of one text, `*_ratio` are speeds against something."""

    size: str
    precision: Precision
    parameters: int
    weight_mb: float
    read_gb_per_s: float
    floor_ms: float
    single_ms: float
    floor_ratio: float  # the floor over single: 1 is the speed of memory
    transformers_ratio: float | None
    batch_tokens_per_s: float
    batch_ratio: float  # over one text
    by_path_ratio: float  # over the same engine batching by path
    switch_ratio: float  # over reading the whole context again


def write_store(directory: Path, config: ModelConfig, vocab_size: int, topology: Topology) -> dict[str, str]:
    """Random modules; returns module id -> digest."""
    store, generator = BlobStore(directory), np.random.default_rng(0)
    digests = {}
    for module_id in topology.module_ids:
        file = store.scratch() / "module"
        specs = module_spec(config, vocab_size, topology, module_id).tensors
        with tensor_file.Writer(file, specs) as writer:
            for spec in sorted(specs, key=lambda spec: spec.name):
                values = generator.standard_normal(spec.num_elements, np.float32) * np.float32(config.init_std)
                writer.append(values if len(spec.shape) == 2 else np.ones_like(values))
            digests[module_id], _ = writer.finish()
        store.adopt(file, digests[module_id])
    return digests


class Bench:
    """One model of random weights, one precision."""

    def __init__(self, source: PathSource, precision: Precision, prompt: Sequence[int], tokens: int) -> None:
        self._source, self._prompt, self._tokens = source, list(prompt), tokens
        cache = source.cache
        self._modules = ResidentModules(
            cache.store, source.config, source.vocab_size, source.topology, cache.budget_bytes, precision
        )
        self._served = Served(source, OnePath())
        self._switch_tokens = min(SWITCH_TOKENS, source.config.sequence_length)

    @property
    def path_bytes(self) -> int:
        return sum(self._modules.level_bytes)

    def _stepper(self, paths: Sequence[int], by_path: bool = False) -> Stepper:
        """Texts of these paths whose prompts are read."""
        stepper = Stepper(self._modules, BatchLimits(running=len(paths), chunk_tokens=1024, by_path=by_path))
        for path in paths:
            request = Request(self._prompt, 2 * self._tokens + 8, Sampling(0.0), path=path)
            stepper.schedule.add(Stream(request, self._served, READING))
        stepper.join()
        while any(stream.written < 1 for stream in stepper.schedule.running):
            stepper.step()
        return stepper

    def decoding(self, paths: Sequence[int], by_path: bool = False) -> float:
        """Seconds of one step."""
        stepper = self._stepper(paths, by_path)
        stepper.step()
        seconds = []
        for _ in range(self._tokens):
            began = clock()
            stepper.step()
            seconds.append(clock() - began)
        return min(seconds)

    def whole_text(self) -> float:
        """Seconds of a prompt and all its tokens."""
        stepper = self._stepper([0])
        began = clock()
        stepper.schedule.leave(stepper.schedule.running[0])
        stepper.schedule.add(Stream(Request(self._prompt, self._tokens, Sampling(0.0), path=0), self._served, READING))
        stepper.join()
        while not stepper.schedule.idle:
            stepper.step()
        return clock() - began

    def reading_again(self, first: int) -> float:
        """Seconds of running the blocks from `first` on over a long context."""
        stepper = self._stepper([0])
        modules, context = stepper.modules_of(stepper.schedule.running[0]), [1] * self._switch_tokens
        stepper.forward.prefill(0, context, 0, 0, modules)
        began = clock()
        stepper.forward.prefill(0, context, first, 0, modules)
        return clock() - began

    def sum_of_weights(self) -> float:
        """Seconds of reading the bytes of a path once, in float32."""
        _, tensors = self._source.modules(0)
        began = clock()
        for tensor in tensors.values():
            tensor.sum()
        return clock() - began


def transformers_text(source: PathSource, prompt: Sequence[int], tokens: int) -> Callable[[], float]:
    """The same path and text with transformers: a function that returns the seconds it takes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from model.hugging_face import checkpoint_config

    llama = LlamaForCausalLM(LlamaConfig(**checkpoint_config(source.config, source.vocab_size))).eval()
    tensors = dict(source.modules(0)[1])
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    llama.load_state_dict(tensors)
    ids = torch.tensor([[READING.bos_id, *prompt]])

    def generate() -> float:
        began = clock()
        llama.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return clock() - began

    return generate


def best_of(timed: Timed, rounds: int) -> dict[str, float]:
    """The least of several rounds, in each of which everything is measured once."""
    found = {name: float("inf") for name in timed}
    for _ in range(rounds):
        for name, measure in timed.items():
            found[name] = min(found[name], measure())
    return found


def measure(size: str, precision: Precision, source: PathSource, options: argparse.Namespace) -> Result:
    """All ratios of one model."""
    generator = np.random.default_rng(1)
    prompt = [int(token) for token in generator.integers(0, source.vocab_size, options.context)]
    bench = Bench(source, precision, prompt, options.tokens)
    paths = [index % PATHS for index in range(TEXTS)]
    timed: Timed = {
        "sum": bench.sum_of_weights,
        "single": lambda: bench.decoding([0]),
        "batch": lambda: bench.decoding(paths),
        "by path": lambda: bench.decoding(paths, by_path=True),
        "all": lambda: bench.reading_again(0),
        "switch": lambda: bench.reading_again(source.config.blocks // 2),
    }
    if options.transformers:
        timed |= {"ours": bench.whole_text, "transformers": transformers_text(source, prompt, options.tokens)}
    seconds = best_of(timed, options.rounds)
    parameters = num_parameters(source.config, source.vocab_size, source.topology)
    bandwidth = 4 * parameters / seconds["sum"]
    floor = bench.path_bytes / bandwidth
    return Result(
        size=size,
        precision=precision,
        parameters=parameters,
        weight_mb=bench.path_bytes / 1e6,
        read_gb_per_s=bandwidth / 1e9,
        floor_ms=1e3 * floor,
        single_ms=1e3 * seconds["single"],
        floor_ratio=floor / seconds["single"],
        transformers_ratio=seconds["transformers"] / seconds["ours"] if options.transformers else None,
        batch_tokens_per_s=TEXTS / seconds["batch"],
        batch_ratio=TEXTS * seconds["single"] / seconds["batch"],
        by_path_ratio=seconds["by path"] / seconds["batch"],
        switch_ratio=seconds["all"] / seconds["switch"],
    )


def results(options: argparse.Namespace) -> list[Result]:
    """Of every size in every precision; tells each as it is found."""
    found = []
    for size in options.sizes:
        config, vocab_size = SIZES[size]
        half = config.blocks // 2
        levels = [
            LevelConfig(modules=2, blocks=list(range(half)), embedding=True),
            LevelConfig(modules=2, blocks=list(range(half, config.blocks)), head=True),
        ]
        topology = Topology.from_config(TopologyConfig(levels=levels))
        with tempfile.TemporaryDirectory(prefix="dipaco-bench-") as scratch:
            store = Path(scratch)
            digests = write_store(store, config, vocab_size, topology)
            paths = [[digests[each] for each in topology.modules_of_path(path)] for path in range(PATHS)]
            cache = ModuleCache(BlobStore(store), 1 << 34)
            source = PathSource(config, vocab_size, topology, paths, cache)
            for precision in options.precisions:
                found.append(measure(size, precision, source, options))
                if not options.json:
                    print(line(found[-1]), flush=True)
    return found


def line(result: Result) -> str:
    """A result for people."""
    generate = "" if result.transformers_ratio is None else f", {result.transformers_ratio:.2f}x transformers"
    return (
        f"{result.size} {result.precision}: one text {result.single_ms:.1f} ms a token, floor {result.floor_ms:.1f} ms "
        f"({result.floor_ratio:.2f} of it at {result.read_gb_per_s:.1f} GB/s){generate}; {TEXTS} texts over {PATHS} "
        f"paths {result.batch_tokens_per_s:.0f} tokens/s, {result.batch_ratio:.1f}x one text, "
        f"{result.by_path_ratio:.2f}x batching by path; switch {result.switch_ratio:.2f}x a full re-prefill"
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed of inference, as ratios within one run.")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--precisions", nargs="+", type=check_precision, default=list(get_args(Precision)))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--context", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens that are written and timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--transformers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--clock", choices=("wall", "processor"), default="wall", help="processor time: one thread on a shared machine"
    )
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


clock: Callable[[], float] = time.perf_counter


def main(arguments: Sequence[str] | None = None) -> int:
    global clock
    options = parse(arguments)
    if options.clock == "processor":
        if options.threads != 1:
            print("--clock processor adds up all threads' time; it needs --threads 1", file=sys.stderr)
            return 2
        clock = time.process_time
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    found = results(options)
    if options.json:
        rows: list[dict[str, Any]] = [asdict(result) for result in found]
        print(json.dumps({"threads": options.threads, "clock": options.clock, "results": rows}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
