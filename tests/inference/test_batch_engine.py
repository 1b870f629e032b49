"""The engine of many texts against the engine of one."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from configs.schema import LevelConfig
from inference.batch_engine import BatchEngine, BatchLimits, EngineBroken, Full, Ticket
from inference.engine import Engine, GeneratedToken, NoRouterLM, PromptTooLong, Request
from inference.precision import Precision
from inference.sampling import Sampling
from inference.stream import BadScores, Reading, Served, Stream, UnknownToken
from model.topology import UnknownPath
from routing.router import Router, RouteState
from tests.inference.conftest import SEQUENCE_LENGTH, VOCAB_SIZE, Mixture, Script

PREFIX_TOKENS = 8
READING = Reading(PREFIX_TOKENS, bos_id=0, eos_id=3)
THREE_LEVELS = [
    LevelConfig(modules=1, blocks=[3], embedding=True),
    LevelConfig(modules=2, blocks=[1, 2]),
    LevelConfig(modules=2, blocks=[0], head=True),
]
HEAD_ALONE = [LevelConfig(modules=1, blocks=[0, 1, 2, 3], embedding=True), LevelConfig(modules=3, head=True)]


@dataclass
class ByText:
    """A router of many texts: the path follows from the token it saw last, and from how many it saw."""

    num_paths: int = 4
    version: str = "by text"

    def route(self, tokens: np.ndarray, state: RouteState | None = None) -> tuple[np.ndarray, RouteState]:
        posterior = np.zeros(self.num_paths)
        posterior[(int(tokens[-1]) + len(tokens)) % self.num_paths] = 1.0
        return posterior, RouteState(len(tokens) - 1)


@dataclass
class Heard:
    """What one text's callbacks heard."""

    tokens: list[GeneratedToken] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    ticket: Ticket | None = None

    def emit(self, token: GeneratedToken) -> None:
        assert not self.ended.is_set()
        self.tokens.append(token)
        if token.finish is not None:
            self.ended.set()

    def failed(self, error: Exception) -> None:
        self.errors.append(error)
        self.ended.set()

    def whole(self) -> list[GeneratedToken]:
        assert self.ended.wait(60)
        assert not self.errors, self.errors
        return self.tokens


def ask(engine: BatchEngine, request: Request) -> Heard:
    heard = Heard()
    heard.ticket = engine.submit(request, heard.emit, heard.failed)
    return heard


@pytest.fixture
def start() -> Iterator[Callable[..., BatchEngine]]:
    engines: list[BatchEngine] = []

    def begin(
        mixture: Mixture,
        router: Router | None = None,
        limits: BatchLimits | None = None,
        precision: Precision = "float32",
        budget_bytes: int = 1 << 30,
    ) -> BatchEngine:
        router = router or ByText(mixture.topology.num_paths)
        engines.append(BatchEngine(mixture.source(budget_bytes), router, READING, limits=limits, precision=precision))
        return engines[-1]

    yield begin
    for engine in engines:
        engine.close(drain=False)


def alone(mixture: Mixture, request: Request, router: Router | None = None) -> list[GeneratedToken]:
    router = router or ByText(mixture.topology.num_paths)
    engine = Engine(mixture.source(), router, PREFIX_TOKENS, READING.bos_id, READING.eos_id)
    return list(engine.generate(request))


def requests(seed: int, count: int) -> list[Request]:
    """Prompts of all lengths, some beyond the sequence; greedy and seeded, routed once, often, or fixed."""
    generator = np.random.default_rng(seed)
    found = []
    for index in range(count):
        length = int(generator.choice([1, 5, 8, 20, 50, SEQUENCE_LENGTH + 9]))
        prompt = [int(token) for token in generator.integers(4, VOCAB_SIZE, length)]
        sampling = Sampling(0.0) if index % 3 == 0 else Sampling(0.9, top_k=12, top_p=0.95, seed=index)
        every = (None, 4, 7)[index % 3]
        path = 1 if index % 5 == 4 else None
        found.append(Request(prompt, int(generator.integers(1, 60)), sampling, every, path))
    return found


def agree(mixture: Mixture, request: Request, found: Sequence[GeneratedToken]) -> None:
    """Equal to the same text written alone, up to a near-tie."""
    expected = alone(mixture, request)
    for place, (ours, theirs) in enumerate(zip(found, expected, strict=False)):
        if ours != theirs:
            assert ours.path_index == theirs.path_index, (place, ours, theirs)
            text = [0, *request.prompt, *(token.token for token in expected[:place])]
            assert len(text) <= SEQUENCE_LENGTH, (place, ours, theirs)
            scores = mixture.logits(theirs.path_index, text)
            assert abs(scores[ours.token] - scores[theirs.token]) < 1e-3, (place, ours, theirs)
            return
    assert len(found) == len(expected)


@pytest.mark.parametrize("levels", [None, THREE_LEVELS, HEAD_ALONE], ids=["2x2", "three levels", "head alone"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_texts_in_one_batch_are_the_texts_written_alone(
    make_mixture: Callable[..., Mixture],
    start: Callable[..., BatchEngine],
    levels: list[LevelConfig] | None,
    tied: bool,
) -> None:
    mixture = make_mixture(levels, tie_embeddings=tied)
    engine = start(mixture, limits=BatchLimits(running=5, chunk_tokens=16))
    asked = requests(seed=1, count=14)
    for request, heard in [(request, ask(engine, request)) for request in asked]:
        agree(mixture, request, heard.whole())
    stats = engine.stats()
    assert stats.switches > 5
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.tokens > stats.steps  # they did go together


@pytest.mark.parametrize("by_path", [True, False])
def test_cancelled_and_late_texts_leave_the_others_as_they_are(
    mixture: Mixture, start: Callable[..., BatchEngine], by_path: bool
) -> None:
    engine = start(mixture, limits=BatchLimits(running=4, chunk_tokens=8, by_path=by_path))
    unwanted, kept = [], []
    for index, request in enumerate(requests(seed=2, count=14)):
        heard = ask(engine, request)
        if index % 4 == 1:
            assert heard.ticket is not None
            if index % 8 == 1:
                wait_for(lambda heard=heard: bool(heard.tokens))  # type: ignore[misc]
            heard.ticket.cancel()
            unwanted.append((heard, len(heard.tokens)))
        else:
            kept.append((request, heard))
    for request, heard in kept:
        agree(mixture, request, heard.whole())
    engine.close()
    assert all(not heard.errors for heard, _ in unwanted)
    assert engine.stats().running == 0


def wait_for(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(6000):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("waited for a minute")


@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 0.05), ("int8", 0.1)])
def test_lower_precisions_score_nearly_alike(
    make_mixture: Callable[..., Mixture], start: Callable[..., BatchEngine], precision: Precision, tolerance: float
) -> None:
    mixture = make_mixture(hidden_size=64, init_std=0.1)
    engine = start(mixture, precision=precision)
    request = Request([7, 3, 22, 9, 9, 31], 20, Sampling(0.0), path=2)
    tokens = [0, *request.prompt]
    for generated in ask(engine, request).whole():
        scores = mixture.logits(2, tokens)
        assert scores.max() - scores[generated.token] < tolerance * (scores.max() - scores.min())
        tokens.append(generated.token)


def test_the_queue_is_bounded(mixture: Mixture, start: Callable[..., BatchEngine]) -> None:
    engine = start(mixture, limits=BatchLimits(running=1, waiting=1))
    hold: queue.Queue[None] = queue.Queue()
    began = threading.Event()

    def emit(token: GeneratedToken) -> None:
        began.set()
        hold.get()

    first = engine.submit(Request([5], 3, path=0), emit, lambda error: None)
    assert began.wait(60)
    second = ask(engine, Request([6], 3, path=0))
    with pytest.raises(Full, match="1 texts wait already"):
        ask(engine, Request([7], 3, path=0))
    assert second.ticket is not None
    second.ticket.cancel()
    third = ask(engine, Request([7], 3, path=0))  # in the place of the cancelled one
    first.cancel()
    for _ in range(3):
        hold.put(None)
    assert len(third.whole()) <= 3
    assert not second.tokens


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (Request([5] * SEQUENCE_LENGTH, 1, past_length="stop"), PromptTooLong),
        (Request([5], 1, path=4), UnknownPath),
        (Request([5], 1, by_router_lm=True), NoRouterLM),
        (Request([5, VOCAB_SIZE], 1), UnknownToken),
        (Request([-1], 1), UnknownToken),
        (Request([5], 0), UnknownToken),
    ],
)
def test_what_cannot_be_answered_is_refused_at_once(
    mixture: Mixture, start: Callable[..., BatchEngine], request_: Request, error: type[Exception]
) -> None:
    with pytest.raises(error):
        ask(start(mixture), request_)


def test_an_error_ends_one_text_alone(mixture: Mixture, start: Callable[..., BatchEngine]) -> None:
    mixture.store.delete(mixture.digests["1.1"])
    engine = start(mixture, limits=BatchLimits(running=3))
    texts = [ask(engine, Request([5, 6, 7], 20, Sampling(0.0), path=path)) for path in (0, 1, 2)]
    assert len(texts[0].whole()) == len(texts[2].whole()) == 20
    assert texts[1].ended.wait(60)
    assert "is not in" in str(texts[1].errors[0])

    def refuse(token: GeneratedToken) -> None:
        raise RuntimeError("the client is gone")

    errors: list[Exception] = []
    engine.submit(Request([5], 20, path=0), refuse, errors.append)
    assert ask(engine, Request([5], 5, Sampling(0.0), path=0)).whole()
    wait_for(lambda: bool(errors))
    assert str(errors[0]) == "the client is gone"
    wait_for(lambda: engine.stats().running == 0)


def test_a_path_that_diverged_is_told(mixture: Mixture) -> None:
    stream = Stream(Request([5], 2, path=3), Served(mixture.source(), ByText()), READING)
    stream.route()
    with pytest.raises(BadScores, match=r"path 1\.1 scores the next token with numbers that are not finite"):
        stream.take(np.full(VOCAB_SIZE, np.nan, np.float32))


def test_a_slot_is_clean_after_what_was_not_finite(mixture: Mixture, start: Callable[..., BatchEngine]) -> None:
    engine = start(mixture, limits=BatchLimits(running=2))
    slots = engine._stepper.slots
    slots.keys.fill_(torch.nan)
    slots.values.fill_(torch.nan)
    for slot in range(2):
        slots.clear(slot, SEQUENCE_LENGTH)
    texts = [Request([5] * length, 10, Sampling(0.0), path=length % 4) for length in (3, 30)]
    for request, heard in [(request, ask(engine, request)) for request in texts]:
        agree(mixture, request, heard.whole())


def test_a_step_that_fails_as_a_whole_tells_what_it_did_before(
    mixture: Mixture, start: Callable[..., BatchEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(mixture, limits=BatchLimits(running=2))
    stepper, failures = engine._stepper, iter([ZeroDivisionError("oh")])
    write = stepper._write

    def breaks_after_writing() -> None:
        write()
        if any(isinstance(each.outcome, GeneratedToken) and each.outcome.finish for each in stepper._events):
            for error in failures:
                raise error

    monkeypatch.setattr(stepper, "_write", breaks_after_writing)
    short, long = Heard(), Heard()
    engine.submit(Request([6], 10_000, path=1, past_length="slide"), long.emit, long.failed)
    wait_for(lambda: bool(long.tokens))
    engine.submit(Request([5], 3, Sampling(0.0), path=0), short.emit, short.failed)
    assert len(short.whole()) == 3
    assert long.ended.wait(60)
    assert str(long.errors[0]) == "oh"
    assert len(ask(engine, Request([5], 5, Sampling(0.0), path=0)).whole()) == 5  # it goes on
    assert not engine.stats().broken


def test_an_engine_that_cannot_go_on_tells_everyone(
    mixture: Mixture, start: Callable[..., BatchEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(mixture, limits=BatchLimits(running=2))
    release = threading.Event()
    slow = Heard()

    def emit(token: GeneratedToken) -> None:
        slow.emit(token)
        assert release.wait(60)

    def fails(*arguments: object) -> None:
        raise MemoryError("no memory")

    engine.submit(Request([5], 10_000, path=0, past_length="slide"), emit, slow.failed)
    wait_for(lambda: bool(slow.tokens))
    others = [ask(engine, Request([5], 50, path=0)) for _ in range(3)]  # one of them waits
    for place in ("_read", "_write"):
        monkeypatch.setattr(engine._stepper, place, fails)
    monkeypatch.setattr(engine._stepper.slots, "clear", fails)
    release.set()
    for heard in (slow, *others):
        assert heard.ended.wait(60)
        assert len(heard.errors) == 1
    told = [str(heard.errors[0]) for heard in (slow, *others)]
    assert any("the engine failed (MemoryError: no memory) and writes nothing any more" in each for each in told)
    wait_for(lambda: engine.stats().broken)
    with pytest.raises(EngineBroken, match="restart it"):
        ask(engine, Request([5], 1))
    assert (engine.stats().running, engine.stats().waiting) == (0, 0)
    engine.close()


def test_close_drains_or_cuts(mixture: Mixture, start: Callable[..., BatchEngine]) -> None:
    engine = start(mixture, limits=BatchLimits(running=2))
    texts = [ask(engine, Request([5], 30, Sampling(0.0), path=0)) for _ in range(5)]
    engine.close()
    assert [len(heard.whole()) for heard in texts] == [30] * 5
    with pytest.raises(Full, match="the engine ends"):
        ask(engine, Request([5], 1))
    engine = start(mixture, limits=BatchLimits(running=1))
    texts = [ask(engine, Request([5], 10_000, path=0, past_length="slide")) for _ in range(3)]
    wait_for(lambda: bool(texts[0].tokens))
    engine.close(drain=False)
    assert [str(heard.errors[0]) for heard in texts] == ["the engine was closed before the text was written"] * 3


def test_a_text_keeps_the_snapshot_it_began_with(
    make_mixture: Callable[..., Mixture], start: Callable[..., BatchEngine]
) -> None:
    mixture = make_mixture()
    older = Mixture(mixture.config, mixture.topology, mixture.store, dict(mixture.digests))
    newer = Mixture(mixture.config, mixture.topology, mixture.store, dict(mixture.digests))
    newer.digests["1.0"], newer.digests["1.1"] = newer.digests["1.1"], newer.digests["1.0"]
    engine = start(older, limits=BatchLimits(running=4))
    request = Request([5, 9, 12], 50, Sampling(0.0), every=4)
    began = threading.Event()
    first = Heard()

    def emit(token: GeneratedToken) -> None:
        first.emit(token)
        began.set()

    engine.submit(request, emit, first.failed)
    assert began.wait(60)
    engine.renew(newer.source(), ByText())
    second = ask(engine, request)
    agree(older, request, first.whole())
    agree(newer, request, second.whole())
    assert engine.stats().snapshots == 1
    other = make_mixture(hidden_size=64)
    with pytest.raises(ValueError, match="another model"):
        engine.renew(other.source(), ByText())


def test_a_store_of_256_paths_in_a_tenth_of_its_bytes(
    make_mixture: Callable[..., Mixture], start: Callable[..., BatchEngine]
) -> None:
    levels = [
        LevelConfig(modules=16, blocks=[0, 1], embedding=True),
        LevelConfig(modules=16, blocks=[2, 3], head=True),
    ]
    mixture = make_mixture(levels)
    total = sum(mixture.store.size(digest) for digest in mixture.digests.values())
    engine = start(mixture, limits=BatchLimits(running=8), budget_bytes=total // 10)
    asked = [Request([5 + index, 9], 30, Sampling(0.0), path=37 * index % 256) for index in range(12)]
    largest = 0
    for request, heard in [(request, ask(engine, request)) for request in asked]:
        agree(mixture, request, heard.whole())
        largest = max(largest, engine.stats().cache_bytes)
    stats = engine.stats()
    assert 0 < largest <= total // 10
    assert stats.cache_hits > 5 * stats.cache_reads  # modules stay for a turn of many steps
    assert stats.tokens == sum(len(heard) for heard in [alone(mixture, request) for request in asked])


def test_one_router_call_a_look(mixture: Mixture, start: Callable[..., BatchEngine]) -> None:
    router = Script(lambda looked: looked // 4 % 4)
    request = Request([7, 3, 22, 9, 9, 31], 30, Sampling(0.0), every=4)
    found = ask(start(mixture, router), request).whole()
    assert [token.path_index for token in found] == [
        token.path_index for token in alone(mixture, request, Script(lambda looked: looked // 4 % 4))
    ]
    assert router.looks == [6, 8, 12, 16, 20, 24, 28, 32][: len(router.looks)]
