"""The HTTP door, asked by the official client of the OpenAI API: answers, streams, errors, clients that leave."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs the extra `serve`")
openai = pytest.importorskip("openai", reason="needs the extra `dev`")
httpx2 = pytest.importorskip("httpx2", reason="comes with openai")

from inference.chat_template import TURN_ENDS  # noqa: E402
from inference.engine import Request  # noqa: E402
from inference.sampling import Sampling  # noqa: E402
from inference.served_model import Limits  # noqa: E402
from tests.inference.text_server import NAME, Held, TextServer, TinyModel  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default::ResourceWarning")
PROMPT = "stir the onions"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return TinyModel.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def server(model: TinyModel) -> Iterator[TextServer]:
    with TextServer(model) as server:
        yield server


def client_of(server: TextServer, key: str = "none", **options: Any) -> Any:
    return openai.OpenAI(base_url=server.url, api_key=key, max_retries=0, timeout=60.0, **options)


@pytest.fixture(scope="module")
def client(server: TextServer) -> Iterator[Any]:
    with client_of(server) as client:
        yield client


def request_of(model: TinyModel, prompt: str = PROMPT, tokens: int = 24, **changes: Any) -> Request:
    sampling = Sampling(changes.pop("temperature", 0.7), changes.pop("top_k", None), changes.pop("top_p", None), 5)
    return Request(model.tokenizer.encode(prompt), tokens, sampling, **changes)


def test_a_completion_is_what_the_engine_writes_alone(model: TinyModel, client: Any) -> None:
    text, paths = model.alone(request_of(model, every=4))
    answer = client.completions.create(
        model=NAME, prompt=PROMPT, max_tokens=24, temperature=0.7, seed=5, extra_body={"route": "every:4"}
    )
    choice = answer.choices[0]
    assert choice.text == text
    segments = [path for each in choice.dipaco["paths"] for path in [each["path"]] * each["tokens"]]
    assert segments == paths
    assert len(set(paths)) > 1
    assert answer.dipaco["route"] == "every:4"
    assert answer.system_fingerprint == "snapshot-0"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(PROMPT), len(paths))


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_p": 0.3}, {"top_k": 3}])
def test_sampling_settings_reach_the_engine(model: TinyModel, client: Any, settings: dict[str, Any]) -> None:
    text, _ = model.alone(request_of(model, **settings))
    asked = {"temperature": 0.7, **settings}
    extra = {"top_k": asked.pop("top_k")} if "top_k" in asked else None
    answer = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=24, seed=5, extra_body=extra, **asked)
    assert answer.choices[0].text == text


def test_a_model_can_be_one_path(model: TinyModel, client: Any) -> None:
    text, _ = model.alone(request_of(model, path=2))
    asked = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0.7, "seed": 5}
    by_name = client.completions.create(model=f"{NAME}/1.0", **asked)
    by_route = client.completions.create(model=NAME, extra_body={"route": "path:1.0"}, **asked)
    assert by_name.choices[0].text == by_route.choices[0].text == text
    assert by_name.choices[0].dipaco["paths"] == [{"path": "1.0", "tokens": 24}]


def test_a_stream_is_the_whole_in_pieces_with_usage(client: Any) -> None:
    asked = {"model": NAME, "prompt": PROMPT, "max_tokens": 24, "temperature": 0.7, "seed": 5}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(stream=True, stream_options={"include_usage": True}, **asked))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert len(chunks) > 5
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert [chunk.choices[0].finish_reason for chunk in chunks[-3:-1]] == [None, "length"]
    assert all(chunk.choices[0].dipaco["path"] for chunk in chunks[:-1])


def test_several_prompts_and_several_texts_of_each(client: Any) -> None:
    answer = client.completions.create(model=NAME, prompt=["ab", "cd"], n=2, max_tokens=12, seed=1)
    texts = [choice.text for choice in sorted(answer.choices, key=lambda choice: choice.index)]
    assert len(set(texts)) == 4
    alone = [client.completions.create(model=NAME, prompt="ab", max_tokens=12, seed=1).choices[0].text for _ in "xy"]
    assert alone == [texts[0]] * 2
    tokens = client.completions.create(model=NAME, prompt=[99, 100], max_tokens=12, seed=1).choices[0].text
    assert tokens == alone[0]  # the bytes of "ab" as token ids


def test_a_stop_string_ends_the_text(model: TinyModel, client: Any, server: TextServer) -> None:
    text, _ = model.alone(request_of(model, tokens=100))
    stop = text[10:12]
    answer = client.completions.create(
        model=NAME, prompt=PROMPT, max_tokens=100, temperature=0.7, seed=5, stop=[stop, "never this"]
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.usage.completion_tokens < 30
    server.until(server.idle)


def test_a_chat_is_a_plain_template(model: TinyModel, client: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    prompt = "Be brief.\nUser: hi\nAssistant:"
    text, _ = model.alone(request_of(model, prompt))
    assert not any(end in text for end in TURN_ENDS)
    asked = {"model": NAME, "messages": messages, "max_completion_tokens": 24, "temperature": 0.7, "seed": 5}
    answer = client.chat.completions.create(**asked)
    assert answer.choices[0].message.content == text
    assert answer.choices[0].message.role == "assistant"
    assert "base model" in answer.dipaco["note"]
    chunks = list(client.chat.completions.create(stream=True, **asked))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert chunks[0].choices[0].delta.role == "assistant"


def test_models_are_the_mixture_and_its_paths(client: Any) -> None:
    names = [model.id for model in client.models.list()]
    assert names == [NAME, *(f"{NAME}/{path}" for path in ("0.0", "0.1", "1.0", "1.1"))]
    assert client.models.retrieve(f"{NAME}/1.0").dipaco["path"] == "1.0"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'"):
        client.models.retrieve("gpt-4")


@pytest.mark.parametrize(
    ("changes", "kind", "param", "sentence"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "model", "there is no model 'gpt-4' here"),
        ({"prompt": "x" * 200}, openai.BadRequestError, "prompt", "the prompt has 200 tokens, this server takes 127"),
        ({"prompt": [1, 258]}, openai.BadRequestError, "prompt", "token 258 is not in the vocabulary"),
        ({"prompt": []}, openai.BadRequestError, "prompt", "prompt is an empty list"),
        ({"prompt": {"a": 1}}, openai.BadRequestError, "prompt", 'prompt is {"a": 1}'),
        ({"prompt": [1, True]}, openai.BadRequestError, "prompt", "prompt has true among its token ids"),
        ({"prompt": [1, -1]}, openai.BadRequestError, "prompt", "prompt has -1 among its token ids"),
        ({"prompt": [None]}, openai.BadRequestError, "prompt", "prompt has null among its texts"),
        ({"prompt": ["a", [1]]}, openai.BadRequestError, "prompt", "prompt has [1] among its texts"),
        ({"prompt": [[1], "a"]}, openai.BadRequestError, "prompt", 'prompt has "a" among its lists of token ids'),
        ({"prompt": ["x"] * 17}, openai.BadRequestError, "prompt", "17 prompts are given, this server answers 16"),
        ({"prompt": [1] * 128}, openai.BadRequestError, "prompt", "the prompt has 128 tokens, this server takes 127"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens", "max_tokens is 0"),
        ({"max_tokens": 129}, openai.BadRequestError, "max_tokens", "max_tokens is 129, this server writes up to 128"),
        ({"temperature": -1}, openai.BadRequestError, "temperature", "temperature is -1"),
        ({"top_p": 0}, openai.BadRequestError, "top_p", "top_p is 0"),
        ({"n": 99}, openai.BadRequestError, "n", "99 texts are asked for"),
        ({"stop": ["a"] * 17}, openai.BadRequestError, "stop", "stop takes up to 16 strings"),
        ({"logprobs": 1}, openai.BadRequestError, "logprobs", "does not keep the probabilities of tokens"),
        ({"echo": True}, openai.BadRequestError, "echo", "echo is not supported"),
        ({"extra_body": {"wat": 1}}, openai.BadRequestError, "wat", "unknown field 'wat'"),
        ({"extra_body": {"route": "best"}}, openai.BadRequestError, "route", "route 'best' is none of"),
        ({"extra_body": {"route": "ensemble:2"}}, openai.BadRequestError, "route", "is for measuring"),
        ({"extra_body": {"route": "path:7.7"}}, openai.BadRequestError, "route", "there is no path '7.7'"),
        ({"extra_body": {"route": "router:4"}}, openai.BadRequestError, "route", "needs a trained router LM"),
        ({"model": f"{NAME}/0.1", "extra_body": {"route": "every:4"}}, openai.BadRequestError, "route", "is one path"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_one_sentence(
    client: Any, changes: dict[str, Any], kind: type[Exception], param: str, sentence: str
) -> None:
    with pytest.raises(kind) as refused:
        client.completions.create(**{"model": NAME, "prompt": "x", "max_tokens": 4, **changes})
    error: Any = refused.value
    assert error.param == param
    assert error.type == "invalid_request_error"
    assert sentence in error.message


def answer_to(
    server: TextServer, place: str, data: bytes | None = None, method: str | None = None
) -> tuple[int, Any, Any]:
    """Status, headers and body, without a client that knows the API."""
    url = server.url.removesuffix("/v1") + place
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, method=method), timeout=60) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


@pytest.mark.parametrize(
    ("place", "data", "status", "code"),
    [
        ("/v1/completions", b"{", 400, None),
        ("/v1/completions", b"[1]", 400, None),
        ("/v1/completions", b"\xff\xfe", 400, None),
        ("/v1/completions", b"[" * 100_000, 400, None),
        ("/v1/completions", b'{"model": "tiny", "max_tokens": "\\ud800"}', 400, None),
        ("/v1/completions", b'{"model": "tiny", "prompt": "\\ud800"}', 400, None),
        ("/v1/completions", b'{"model": "tiny", "prompt": "x", "\\ud800": 1}', 400, None),
        ("/v1/completions", b'{"model": "tiny", "prompt": ["x", "a\\udfff"]}', 400, None),
        ("/v1/chat/completions", b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', 400, None),
        ("/v1/completions", b" " * (4 * 1024**2 + 1), 413, "request_too_large"),
        ("/v1/completions", None, 405, "unknown_url"),
        ("/v1/embeddings", b"{}", 404, "unknown_url"),
    ],
)
def test_bodies_and_places_that_are_none(
    server: TextServer, place: str, data: bytes | None, status: int, code: str | None
) -> None:
    found, _, body = answer_to(server, place, data)
    assert found == status
    assert json.loads(body)["error"]["code"] == code


def cost_of(act: Callable[[], object]) -> float:
    """Processor seconds of all threads."""
    began_s = time.process_time()
    act()
    return time.process_time() - began_s


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "tiny", "prompt": [[]' + b",-1" * 1_300_000 + b"]}",
        b'{"model": "tiny", "prompt": [1' + b",1" * 2_000_000 + b"]}",
        b'{"model": "tiny", "prompt": [[]' + b",[]" * 1_300_000 + b"]}",
        b'{"model": "tiny", "prompt": "x", "stop": [1' + b",1" * 2_000_000 + b"]}",
        b'{"model": "tiny", "prompt": "x"' + b"".join(b',"%d":1' % number for number in range(300_000)) + b"}",
    ],
    ids=["list, then numbers", "numbers", "lists", "stops", "fields"],
)
def test_a_large_body_is_judged_without_holding_up_the_others(server: TextServer, body: bytes) -> None:
    parsing_s = cost_of(lambda: json.loads(body))
    judging_s = cost_of(lambda: answer_to(server, "/v1/completions", body))
    assert answer_to(server, "/v1/completions", body)[0] == 400
    assert judging_s < 1.0 + 20 * parsing_s, "elements are not looked at one by one before they are counted"


def test_a_prompt_is_judged_by_its_length_before_it_is_tokenized(
    model: TinyModel, server: TextServer, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(text: str) -> list[int]:
        raise AssertionError("tokenized")

    monkeypatch.setattr(model.tokenizer, "encode", never)
    with pytest.raises(openai.BadRequestError, match=r"the prompt has 1000000 characters, this server takes 127") as no:
        client.completions.create(model=NAME, prompt="x" * 1_000_000)
    assert no.value.code == "context_length_exceeded"


def test_halves_of_surrogates_are_counted_as_the_other_mistakes(server: TextServer) -> None:
    def refused() -> float:
        page = answer_to(server, "/metrics")[2].decode()
        name = 'dipaco_requests_total{door="http",status="400"} '
        return float(next((line.removeprefix(name) for line in page.splitlines() if line.startswith(name)), 0))

    before = refused()
    status, _, body = answer_to(server, "/v1/completions", b'{"model": "tiny", "max_tokens": "\\ud800"}')
    assert (status, json.loads(body)["error"]["param"]) == (400, "max_tokens")
    assert refused() == before + 1


def test_health_readiness_and_metrics(server: TextServer, client: Any) -> None:
    client.completions.create(model=NAME, prompt="x", max_tokens=3, extra_body={"route": "path:0.1"})
    assert answer_to(server, "/healthz")[0] == answer_to(server, "/readyz")[0] == 200
    status, headers, page = answer_to(server, "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    numbers = dict(line.rsplit(" ", 1) for line in page.decode().splitlines() if not line.startswith("#"))
    assert float(numbers['dipaco_path_tokens_total{path="0.1"}']) >= 3
    assert float(numbers["dipaco_time_to_first_token_seconds_count"]) >= 1
    assert float(numbers["dipaco_time_per_token_seconds_count"]) >= 2
    assert float(numbers["dipaco_resident_bytes"]) > 1e6
    for name in ("waiting_generations", "batch_rows", "module_bytes", "open_requests"):
        assert f"dipaco_{name}" in numbers
    for name in ("path_switches", "reprefilled_tokens", "module_hits", "module_reads", "generated_tokens"):
        assert f"dipaco_{name}_total" in numbers


def test_a_client_that_leaves_a_stream_frees_its_place(server: TextServer, client: Any) -> None:
    stream = client.completions.create(model=NAME, prompt="x", max_tokens=128, n=16, stream=True)
    next(iter(stream))
    before = server.engine.stats().tokens
    stream.close()
    server.until(server.idle)
    assert server.engine.stats().tokens - before < 16 * 127  # not written to its end


def test_a_client_that_leaves_without_a_stream_frees_its_place(server: TextServer) -> None:
    with client_of(server) as impatient, pytest.raises(openai.APITimeoutError):
        impatient.with_options(timeout=0.05).completions.create(model=NAME, prompt="x", max_tokens=128, n=16)
    server.until(server.idle)


def test_a_full_queue_says_when_to_come_again(model: TinyModel) -> None:
    limits = Limits(prompt_tokens=64, new_tokens=128, running=1, waiting=1)
    held = Held(model.engine(1, 1))
    with TextServer(model, limits, engine=held) as server, client_of(server) as client:
        streams = []
        for _ in range(2):
            streams.append(client.completions.create(model=NAME, prompt=PROMPT, max_tokens=24, seed=5, stream=True))
            if len(streams) == 1:
                next(iter(streams[0]))
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(model=NAME, prompt="x", max_tokens=1)
        assert refused.value.response.headers["retry-after"] == "1"
        assert refused.value.code == "rate_limit_exceeded"
        held.release.set()
        for stream in streams:
            stream.close()
        server.until(server.idle)
        assert client.completions.create(model=NAME, prompt="x", max_tokens=1).choices


def test_a_full_server_does_not_tokenize(model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(model.engine(1, 0))
    with TextServer(model, Limits(64, 128, running=1, waiting=0), engine=held) as server, client_of(server) as client:
        stream = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=24, seed=5, stream=True)
        next(iter(stream))
        monkeypatch.setattr(model.tokenizer, "encode", None)
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model=NAME, prompt="x", max_tokens=1)
        held.release.set()
        stream.close()
        server.until(server.idle)


def test_what_can_never_fit_is_a_mistake_and_not_busy(model: TinyModel) -> None:
    with TextServer(model, Limits(64, 128, running=1, waiting=0)) as server, client_of(server) as client:
        with pytest.raises(openai.BadRequestError, match=r"2 texts are asked for .* this server writes 1"):
            client.completions.create(model=NAME, prompt="x", max_tokens=1, n=2)
        assert client.completions.create(model=NAME, prompt="x", max_tokens=1).choices


def test_a_broken_engine_is_told_by_readiness_and_to_who_asks(
    model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = model.engine()

    def fails(*arguments: object) -> None:
        raise MemoryError("no memory")

    with TextServer(model, engine=engine) as server, client_of(server) as client:
        assert answer_to(server, "/readyz")[0] == 200
        monkeypatch.setattr(engine._stepper, "_read", fails)
        monkeypatch.setattr(engine._stepper.slots, "clear", fails)
        for _ in range(2):
            with pytest.raises(openai.InternalServerError, match="the engine failed and writes nothing") as refused:
                client.completions.create(model=NAME, prompt="x", max_tokens=4)
            assert refused.value.status_code == 503
            assert refused.value.code == "server_not_ready"
        status, _, body = answer_to(server, "/readyz")
        assert (status, b"the engine failed" in body) == (503, True)
        assert answer_to(server, "/healthz")[0] == 200
        assert b"dipaco_engine_broken 1.0" in answer_to(server, "/metrics")[2]


def test_only_a_key_of_the_file_is_admitted(model: TinyModel, tmp_path: Path) -> None:
    from inference.api_keys import ApiKeys

    path = tmp_path / "keys"
    path.write_text("# of the team\nsk-0123456789abcdef\n", encoding="utf-8")
    with TextServer(model, keys=ApiKeys(path)) as server:
        with client_of(server, "sk-0123456789abcdef") as client:
            assert client.completions.create(model=NAME, prompt="x", max_tokens=1).choices
        with client_of(server, "sk-another-key-00") as client, pytest.raises(openai.AuthenticationError) as refused:
            client.models.list()
        assert refused.value.code == "invalid_api_key"
        status, headers, _ = answer_to(server, "/v1/models")
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
        assert answer_to(server, "/healthz")[0] == 200


def test_a_drain_answers_what_is_open_and_refuses_the_rest(model: TinyModel) -> None:
    held = Held(model.engine())
    with TextServer(model, engine=held) as server, client_of(server) as client:
        stream = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=24, seed=5, stream=True)
        first = next(iter(stream))
        server.stop()
        server.until(lambda: server.answering.draining)
        assert answer_to(server, "/readyz")[0] == 503
        with pytest.raises(openai.InternalServerError) as refused:
            client.completions.create(model=NAME, prompt="x", max_tokens=1)
        assert refused.value.status_code == 503
        assert refused.value.response.headers["retry-after"] == "5"
        held.release.set()
        rest = list(stream)
        assert rest[-1].choices[0].finish_reason in ("length", "stop")
        assert first.id == rest[-1].id
        assert server.joined()


def test_a_second_signal_ends_at_once(model: TinyModel) -> None:
    held = Held(model.engine())
    with TextServer(model, engine=held) as server, client_of(server) as client:
        stream = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=24, seed=5, stream=True)
        next(iter(stream))
        server.stop()
        server.cut()
        server.until(lambda: server.whole is not None)
        held.release.set()
        assert not server.joined()
        chunks: list[Any] = []
        with contextlib.suppress(openai.APIError, httpx2.HTTPError):
            chunks.extend(stream)
        assert all(chunk.choices[0].finish_reason is None for chunk in chunks)


def test_a_generation_that_breaks_is_an_error_and_the_server_goes_on(model: TinyModel) -> None:
    class Breaks:
        """An engine that fails after two tokens."""

        def __init__(self, engine: Any) -> None:
            self.engine, self.stats, self.close = engine, engine.stats, engine.close

        def submit(self, request: Request, emit: Any, failed: Any) -> Any:
            if request.max_tokens != 7:
                return self.engine.submit(request, emit, failed)
            threading.Thread(target=failed, args=(ZeroDivisionError("oh"),)).start()
            return self.engine.submit(Request(request.prompt, 1), lambda token: None, lambda error: None)

    with TextServer(model, engine=Breaks(model.engine())) as server, client_of(server) as client:
        with pytest.raises(openai.InternalServerError, match="the generation failed"):
            client.completions.create(model=NAME, prompt="x", max_tokens=7)
        with pytest.raises(openai.APIError, match="the generation failed"):
            list(client.completions.create(model=NAME, prompt="x", max_tokens=7, stream=True))
        assert client.completions.create(model=NAME, prompt="x", max_tokens=8).usage.completion_tokens <= 8
        assert server.idle()


def test_many_clients_get_what_each_would_alone(model: TinyModel, server: TextServer, client: Any) -> None:
    def ask(number: int) -> bool:
        prompt = f"{number} onions"
        request = Request(model.tokenizer.encode(prompt), 12, Sampling(0.8, seed=number), every=5)
        answer = client.completions.create(
            model=NAME, prompt=prompt, max_tokens=12, temperature=0.8, seed=number, extra_body={"route": "every:5"}
        )
        return bool(answer.choices[0].text == model.alone(request)[0])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(12)))
