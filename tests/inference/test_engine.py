from __future__ import annotations

import numpy as np
import pytest

from inference.engine import Engine, PromptTooLong, Request, look_after, window
from inference.sampling import Sampling
from tests.inference.conftest import SEQUENCE_LENGTH, VOCAB_SIZE, Mixture, Script

GREEDY = Sampling(temperature=0.0)
NEVER = VOCAB_SIZE  # an end of text that no path writes
PROMPT = [7, 3, 22, 9, 9, 31]


def engine(mixture: Mixture, router: Script, eos_id: int = NEVER, prefix_tokens: int = 8) -> Engine:
    return Engine(mixture.source(), router, prefix_tokens, bos_id=0, eos_id=eos_id)


def test_greedy_cached_decoding_is_the_uncached_forward_pass(mixture: Mixture) -> None:
    tokens = [0, *PROMPT]
    for generated in engine(mixture, Script(lambda looked: 2)).generate(Request(PROMPT, 40, GREEDY)):
        assert generated.token == int(np.argmax(mixture.logits(2, tokens)))
        tokens.append(generated.token)
    assert len(tokens) == 1 + len(PROMPT) + 40


def test_every_token_is_written_by_the_path_routed_for_it(mixture: Mixture) -> None:
    router = Script(lambda looked: looked // 4 % 4)
    tokens = [0, *PROMPT]
    paths = []
    for generated in engine(mixture, router).generate(Request(PROMPT, 30, GREEDY, every=4)):
        looked = look_after(len(tokens) - 1, 8, 4) if len(tokens) - 1 >= 8 else len(PROMPT)
        assert generated.path_index == looked // 4 % 4
        assert generated.token == int(np.argmax(mixture.logits(generated.path_index, tokens)))
        tokens.append(generated.token)
        paths.append(generated.path_index)
    assert set(paths) == {0, 1, 2, 3}
    assert router.looks == [6, 8, 12, 16, 20, 24, 28, 32]


def test_a_long_prompt_is_routed_by_its_prefix_or_by_its_last_chunk(mixture: Mixture) -> None:
    prompt = [3] * 21
    for every, looks in ((None, [8]), (4, [8, 20])):
        router = Script(lambda looked: 0)
        assert len(list(engine(mixture, router).generate(Request(prompt, 2, GREEDY, every=every)))) == 2
        assert router.looks == looks


def test_a_short_prompt_is_routed_again_once_the_prefix_is_whole(mixture: Mixture) -> None:
    router = Script(lambda looked: 1 if looked < 8 else 2)
    generated = list(engine(mixture, router).generate(Request(PROMPT, 6, GREEDY)))
    assert [item.path_index for item in generated] == [1, 1, 2, 2, 2, 2]
    assert router.looks == [6, 8]


def test_a_fixed_path_asks_no_router(mixture: Mixture) -> None:
    router = Script(lambda looked: 0)
    generated = list(engine(mixture, router).generate(Request(PROMPT, 5, GREEDY, path=3)))
    assert {item.path_index for item in generated} == {3}
    assert router.looks == []


def test_past_the_sequence_the_oldest_half_goes(mixture: Mixture) -> None:
    context = [0, *PROMPT]
    request = Request(PROMPT, SEQUENCE_LENGTH + 40, GREEDY)
    for generated in engine(mixture, Script(lambda looked: 1)).generate(request):
        assert generated.token == int(np.argmax(mixture.logits(1, context)))
        context = window([*context, generated.token], SEQUENCE_LENGTH)
    assert len(context) <= SEQUENCE_LENGTH


def test_or_generation_stops_with_length(mixture: Mixture) -> None:
    request = Request(PROMPT, 1000, GREEDY, past_length="stop")
    generated = list(engine(mixture, Script(lambda looked: 1)).generate(request))
    assert len(generated) == SEQUENCE_LENGTH - len(PROMPT)
    assert [item.finish for item in generated] == [None] * (len(generated) - 1) + ["length"]


def test_a_prompt_that_does_not_fit_is_refused_or_slides(mixture: Mixture) -> None:
    prompt = [5] * SEQUENCE_LENGTH
    with pytest.raises(PromptTooLong, match="the model takes 63"):
        list(engine(mixture, Script(lambda looked: 0)).generate(Request(prompt, 1, GREEDY, past_length="stop")))
    (generated,) = engine(mixture, Script(lambda looked: 0)).generate(Request(prompt, 1, GREEDY))
    assert generated.finish == "length"


def test_the_end_of_the_text_stops(mixture: Mixture) -> None:
    first, second = list(engine(mixture, Script(lambda looked: 0)).generate(Request(PROMPT, 2, GREEDY)))
    stopping = engine(mixture, Script(lambda looked: 0), eos_id=second.token)
    generated = list(stopping.generate(Request(PROMPT, 50, GREEDY)))
    expected = [first.token] if first.token == second.token else [first.token, second.token]
    assert [item.token for item in generated] == expected
    assert generated[-1].finish == "stop"


def test_the_seed_decides_the_tokens(mixture: Mixture) -> None:
    def text(seed: int) -> list[int]:
        request = Request(PROMPT, 30, Sampling(temperature=1.0, top_k=20, top_p=0.95, seed=seed))
        return [item.token for item in engine(mixture, Script(lambda looked: 0)).generate(request)]

    assert text(1) == text(1)
    assert text(1) != text(2)


@pytest.mark.parametrize(
    ("tokens", "every", "look"),
    [(3, None, 3), (3, 4, 3), (8, None, 8), (50, None, 8), (8, 4, 8), (11, 4, 8), (12, 4, 12)],
)
def test_the_grid_of_looks_starts_after_the_prefix(tokens: int, every: int | None, look: int) -> None:
    assert look_after(tokens, 8, every) == look


def test_the_window_keeps_bos_and_the_newest() -> None:
    assert window(range(64), 64) == list(range(64))
    assert window(range(65), 64) == [0, *range(33, 65)]
    assert window(range(200), 64)[0] == 0
    assert window(range(200), 64)[-1] == 199
