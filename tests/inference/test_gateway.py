"""The gateway between the official client of the OpenAI API and backends that answer, fail, die and come back."""

from __future__ import annotations

import json
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs the extra `serve`")
openai = pytest.importorskip("openai", reason="needs the extra `dev`")

from inference.api_keys import ApiKeys  # noqa: E402
from inference.chat_template import TURN_ENDS  # noqa: E402
from protocol.certificates import write_certificates  # noqa: E402
from routing.artefact import RouterArtefact  # noqa: E402
from tests.inference.fake_backend import WORDS, FakeBackend  # noqa: E402
from tests.inference.gateway_server import PATHS, PROMPTS, GatewayServer, make_router, ranked  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default::ResourceWarning")
TEXT = "".join(WORDS)
Backends = dict[str, FakeBackend]


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_router(tmp_path_factory.mktemp("gateway") / "router")


@pytest.fixture(scope="module")
def artefact(router: Path) -> RouterArtefact:
    return RouterArtefact.open(router)


@pytest.fixture
def backends() -> Iterator[Backends]:
    with ExitStack() as stack:
        yield {path: stack.enter_context(FakeBackend(f"model-{path}")) for path in PATHS}


@pytest.fixture
def serve(router: Path, backends: Backends, tmp_path: Path) -> Iterator[Callable[..., GatewayServer]]:
    """Opens a gateway in front of the backends."""
    with ExitStack() as stack:

        def open_gateway(behind: Backends | None = None, **options: Any) -> GatewayServer:
            options = {"probe_s": 0.05, **options}
            return stack.enter_context(GatewayServer(router, behind or backends, tmp_path / "backends.yaml", **options))

        yield open_gateway


def client_of(server: GatewayServer, key: str = "none") -> Any:
    return openai.OpenAI(base_url=server.url, api_key=key, max_retries=0, timeout=60.0)


def ask(client: Any, prompt: Any, **changes: Any) -> tuple[str, str, str]:
    """The text of a completion, the path that answered and the first choice."""
    asked = {"model": "mix", "prompt": prompt, "max_tokens": 8, **changes}
    raw = client.completions.with_raw_response.create(**asked)
    return raw.parse().choices[0].text, raw.headers["x-dipaco-path"], raw.headers["x-dipaco-first-choice"]


def got(server: GatewayServer, place: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(server.url.removesuffix("/v1") + place, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def numbers(server: GatewayServer) -> dict[str, float]:
    page = got(server, "/metrics")[1]
    pairs = (line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def test_a_prompt_goes_where_the_router_sends_it(
    serve: Callable[..., GatewayServer], backends: Backends, artefact: RouterArtefact
) -> None:
    prompts = [*PROMPTS, "x", "add flour and milk", "for item in range(size)", "3.14 mean axis", "the licensee shall"]
    with client_of(serve()) as client:
        for prompt in prompts:
            best = ranked(artefact, prompt)[0]
            assert ask(client, prompt) == (TEXT, best, best)
            asked = backends[best].asked[-1]
            assert asked == {"model": f"model-{best}", "prompt": prompt, "max_tokens": 8}
        ids = artefact.tokenizer.encode(PROMPTS[1])
        assert ask(client, ids)[1] == ask(client, [PROMPTS[1]])[1] == ranked(artefact, PROMPTS[1])[0]
    assert {ranked(artefact, prompt)[0] for prompt in PROMPTS} == set(PATHS)
    assert sum(len(backend.asked) for backend in backends.values()) == len(prompts) + 2


def test_a_stream_passes_as_it_is(serve: Callable[..., GatewayServer], backends: Backends) -> None:
    server = serve()
    with client_of(server) as client:
        chunks = list(
            client.completions.create(
                model="mix", prompt=PROMPTS[2], stream=True, logprobs=2, extra_body={"repetition_penalty": 1.1}
            )
        )
    assert [chunk.choices[0].text for chunk in chunks] == list(WORDS)
    assert chunks[0].id == "cmpl-1"
    asked = backends["1.0"].asked[0]
    assert (asked["logprobs"], asked["repetition_penalty"], asked["stream"]) == (2, 1.1, True)
    found = numbers(server)
    assert found['dipaco_path_requests_total{path="1.0"}'] == 1
    assert found['dipaco_backend_first_byte_seconds_count{path="1.0",stream="true"}'] == 1
    assert found["dipaco_open_requests"] == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("mode", ["500", "503", "429", "401", "404", "302", "dies", "headers", "stopped"])
def test_the_next_best_path_answers_for_one_that_fails_before_its_first_byte(
    serve: Callable[..., GatewayServer], backends: Backends, artefact: RouterArtefact, mode: str, stream: bool
) -> None:
    first, second, third, _ = ranked(artefact, PROMPTS[0])
    server = serve(cool_down_s=60.0, probe_s=60.0)
    with client_of(server) as client:
        assert ask(client, PROMPTS[0]) == (TEXT, first, first)
        if mode == "stopped":
            backends[first].stop()
        else:
            backends[first].mode = mode
        asked = len(backends[first].asked)
        if stream:
            answer = client.completions.with_raw_response.create(model="mix", prompt=PROMPTS[0], stream=True)
            assert answer.headers["x-dipaco-path"] == second
            assert answer.headers["x-dipaco-first-choice"] == first
            assert "".join(chunk.choices[0].text for chunk in answer.parse()) == TEXT
        else:
            assert ask(client, PROMPTS[0]) == (TEXT, second, first)
        assert len(backends[first].asked) == asked + (mode != "stopped")
        assert ask(client, PROMPTS[0]) == (TEXT, second, first)
        assert len(backends[first].asked) == asked + (mode != "stopped"), "it was asked again while it rests"
        backends[second].mode = "500"
        assert ask(client, PROMPTS[0]) == (TEXT, third, first)
    found = numbers(server)
    assert found[f'dipaco_backend_up{{path="{first}"}}'] == found[f'dipaco_backend_up{{path="{second}"}}'] == 0
    assert found[f'dipaco_backend_up{{path="{third}"}}'] == 1
    assert found[f'dipaco_failovers_total{{path="{first}"}}'] == 3
    assert any(line.startswith(f"the backend of path {first} is down") for line in server.said)


def test_a_backend_that_is_back_is_asked_again(
    serve: Callable[..., GatewayServer], backends: Backends, artefact: RouterArtefact
) -> None:
    first, second = ranked(artefact, PROMPTS[3])[:2]
    backends[first].stop()
    server = serve(cool_down_s=60.0)
    assert any("(down)" in line for line in server.said)
    with client_of(server) as client:
        assert ask(client, PROMPTS[3]) == (TEXT, second, first)
        assert numbers(server).get(f'dipaco_backend_failures_total{{path="{first}",kind="unreachable"}}', 0) == 0
        backends[first].start()
        server.until(lambda: f"the backend of path {first} is back" in server.said)
        assert ask(client, PROMPTS[3]) == (TEXT, first, first)


def test_a_rest_after_an_error_ends_by_itself(
    serve: Callable[..., GatewayServer], backends: Backends, artefact: RouterArtefact
) -> None:
    first, second = ranked(artefact, PROMPTS[3])[:2]
    server = serve(cool_down_s=0.3)
    with client_of(server) as client:
        backends[first].mode = "500"
        assert ask(client, PROMPTS[3])[1] == second
        backends[first].mode = "ok"
        server.until(lambda: server.gateway.up()[first])
        assert ask(client, PROMPTS[3])[1] == first


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("mode", ["half", "early"])
def test_a_stream_that_breaks_off_ends_with_an_error(
    serve: Callable[..., GatewayServer], backends: Backends, artefact: RouterArtefact, mode: str, chat: bool
) -> None:
    for backend in backends.values():
        backend.mode = mode
    server = serve()
    pieces: list[str] = []
    with client_of(server) as client:
        if chat:
            messages = [{"role": "user", "content": "hi"}]
            stream = client.chat.completions.create(model="mix", messages=messages, stream=True)
        else:
            stream = client.completions.create(model="mix", prompt=PROMPTS[0], stream=True)
        texts = (chunk.choices[0].delta.content if chat else chunk.choices[0].text for chunk in stream)
        with pytest.raises(openai.APIError, match="not the whole text") as told:
            pieces.extend(texts)
    assert "".join(pieces) == "".join(WORDS[:2])
    assert told.value.code == "backend_lost"
    assert numbers(server)["dipaco_open_requests"] == 0


def test_a_client_that_leaves_ends_the_backends_work(
    serve: Callable[..., GatewayServer], backends: Backends, artefact: RouterArtefact
) -> None:
    best = backends[ranked(artefact, PROMPTS[0])[0]]
    best.mode = "held"
    server = serve()
    with client_of(server) as client:
        stream = client.completions.create(model="mix", prompt=PROMPTS[0], stream=True)
        next(iter(stream))
        stream.close()
        assert best.hung_up.wait(60)
        server.until(lambda: server.gateway.admission.open == 0)


def test_a_chat_goes_on_as_a_completion_of_the_plain_template(
    serve: Callable[..., GatewayServer], backends: Backends, artefact: RouterArtefact
) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    prompt = "Be brief.\nUser: hi\nAssistant:"
    best = ranked(artefact, prompt)[0]
    with client_of(serve()) as client:
        answer = client.chat.completions.create(model="mix", messages=messages, stop="END", presence_penalty=0.5)
        assert answer.choices[0].message.content == TEXT
        assert answer.usage.total_tokens == 7
        assert (answer.model, answer.object) == ("mix", "chat.completion")
        assert (answer.dipaco["path"], answer.dipaco["first_choice"]) == (best, best)
        asked = backends[best].asked[0]
        room = 128 - 1 - len(prompt)
        assert asked == {
            "model": f"model-{best}",
            "prompt": prompt,
            "stop": ["END", *TURN_ENDS],
            "presence_penalty": 0.5,
            "max_tokens": room,
        }
        chunks = list(client.chat.completions.create(model="mix", messages=messages, stream=True, max_tokens=5))
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
        assert chunks[-1].choices[0].finish_reason == "stop"
        assert all(chunk.dipaco["path"] == best and chunk.object == "chat.completion.chunk" for chunk in chunks)
        backends[best].mode = "nonsense"
        with pytest.raises(openai.InternalServerError, match="no completion"):
            client.chat.completions.create(model="mix", messages=messages)


@pytest.mark.parametrize(
    ("changes", "kind", "sentence"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "there is no model 'gpt-4' here"),
        ({"model": "mix/7.7"}, openai.NotFoundError, "there is no model 'mix/7.7' here"),
        ({"prompt": ["a", "b"]}, openai.BadRequestError, "ask for each by itself"),
        ({"prompt": []}, openai.BadRequestError, "a list of 0 prompts"),
        ({"prompt": {"a": 1}}, openai.BadRequestError, "prompt is"),
        ({"prompt": [1, 258]}, openai.BadRequestError, "token 258 is not in the vocabulary"),
        ({"prompt": "x" * 200}, openai.BadRequestError, "the prompt has 200 tokens, this server takes 127"),
        ({"max_tokens": 129}, openai.BadRequestError, "this server writes up to 128"),
        ({"extra_body": {"route": "every:4"}}, openai.BadRequestError, "a gateway chooses once"),
        ({"extra_body": {"route": "router:4"}}, openai.BadRequestError, "needs a trained router LM"),
    ],
)
def test_what_cannot_be_forwarded_is_refused_in_one_sentence(
    serve: Callable[..., GatewayServer],
    backends: Backends,
    changes: dict[str, Any],
    kind: type[Exception],
    sentence: str,
) -> None:
    with client_of(serve()) as client, pytest.raises(kind) as refused:
        client.completions.create(**{"model": "mix", "prompt": "x", "max_tokens": 4, **changes})
    assert sentence in str(refused.value)
    assert not any(backend.asked for backend in backends.values())


def test_bodies_that_are_none_and_chats_that_cannot_be(serve: Callable[..., GatewayServer]) -> None:
    server = serve()
    for body, sentence in ((b"{", "not JSON"), (b'{"model": "mix", "prompt": "\\ud800"}', "surrogate")):
        request = urllib.request.Request(f"{server.url}/completions", body)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=60)
        with refused.value as error:
            assert error.code == 400
            assert sentence in json.loads(error.read())["error"]["message"]
    tool = {"type": "function", "function": {"name": "f"}}
    with client_of(server) as client, pytest.raises(openai.BadRequestError, match="knows no tools"):
        client.chat.completions.create(model="mix", messages=[{"role": "user", "content": "x"}], tools=[tool])


@pytest.mark.parametrize("prompt", [b"[[]" + b",-1" * 1_300_000, b"[1" + b",1" * 2_000_000], ids=["mixed", "numbers"])
def test_a_large_body_is_judged_at_once(serve: Callable[..., GatewayServer], prompt: bytes) -> None:
    server, body = serve(), b'{"model": "mix", "prompt": ' + prompt + b"]}"
    began_s = time.process_time()
    json.loads(body)
    parsed_s = time.process_time()
    request = urllib.request.Request(f"{server.url}/completions", body)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    with refused.value as error:
        assert error.code == 400
    assert time.process_time() - parsed_s < 1.0 + 20 * (parsed_s - began_s)


def test_what_a_backend_says_of_a_request_goes_to_the_client(
    serve: Callable[..., GatewayServer], backends: Backends
) -> None:
    for backend in backends.values():
        backend.mode = "400"
    with client_of(serve()) as client:
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match="a 400 of the backend"):
                client.completions.create(model="mix", prompt="x", stream=stream)
        with pytest.raises(openai.BadRequestError, match="a 400 of the backend"):
            client.chat.completions.create(model="mix", messages=[{"role": "user", "content": "x"}])
    assert sum(len(backend.asked) for backend in backends.values()) == 3


def test_a_path_that_is_asked_for_by_name_is_not_replaced(
    serve: Callable[..., GatewayServer], backends: Backends
) -> None:
    server = serve()
    with client_of(server) as client:
        assert [model.id for model in client.models.list()] == ["mix", *(f"mix/{path}" for path in PATHS)]
        assert client.models.retrieve("mix/1.0").dipaco["path"] == "1.0"
        assert ask(client, PROMPTS[0], model="mix/1.1") == (TEXT, "1.1", "1.1")
        assert ask(client, PROMPTS[0], extra_body={"route": "path:1.0"}) == (TEXT, "1.0", "1.0")
        backends["1.0"].mode = "500"
        with pytest.raises(openai.InternalServerError, match=r"path 1\.0 answered 500") as refused:
            ask(client, PROMPTS[0], model="mix/1.0")
        assert (refused.value.status_code, refused.value.code) == (503, "no_path_answers")


def test_where_all_fail_the_client_is_told_why_and_when_to_come_again(
    serve: Callable[..., GatewayServer], backends: Backends
) -> None:
    backends["0.0"].stop()
    backends["1.1"].mode = "dies"
    for path in ("0.1", "1.0"):
        backends[path].mode = "500"
    server = serve(cool_down_s=60.0, probe_s=60.0)
    with client_of(server) as client:
        with pytest.raises(openai.InternalServerError) as refused:
            client.completions.create(model="mix", prompt="x")
        assert refused.value.response.headers["retry-after"] == "1"
        for words in ("path 0.1 answered 500", "path 1.0 answered 500", "path 1.1 broke the connection"):
            assert words in str(refused.value)
        assert got(server, "/readyz") == (503, "no backend is up\n")
        assert got(server, "/healthz")[0] == 200
        backends["0.1"].mode = "ok"
        assert ask(client, "x")[1] == "0.1"  # none is up: all are tried, as one may be back
        for backend in backends.values():
            backend.mode = "429"
        with pytest.raises(openai.RateLimitError):
            ask(client, "x", model="mix/0.1")


def test_a_path_without_a_backend_is_replaced_and_not_offered(
    serve: Callable[..., GatewayServer], backends: Backends, artefact: RouterArtefact
) -> None:
    first, second = ranked(artefact, PROMPTS[0])[:2]
    server = serve({path: backend for path, backend in backends.items() if path != first}, offer={"partial": True})
    with client_of(server) as client:
        assert ask(client, PROMPTS[0]) == (TEXT, second, first)
        assert f"mix/{first}" not in [model.id for model in client.models.list()]
        with pytest.raises(openai.NotFoundError, match="has no backend here"):
            ask(client, "x", model=f"mix/{first}")


def test_keys_are_those_of_each_side(
    serve: Callable[..., GatewayServer], backends: Backends, artefact: RouterArtefact, tmp_path: Path
) -> None:
    best = ranked(artefact, PROMPTS[0])[0]
    (tmp_path / "one").write_text("sk-of-the-backend\n", encoding="utf-8")
    (tmp_path / "keys").write_text("sk-0123456789abcdef\n", encoding="utf-8")
    server = serve(keys={best: tmp_path / "one"}, doors={"keys": ApiKeys(tmp_path / "keys")})
    with client_of(server, "sk-0123456789abcdef") as client:
        ask(client, PROMPTS[0])
        ask(client, PROMPTS[0], model=f"mix/{next(path for path in PATHS if path != best)}")
    assert backends[best].keys == ["Bearer sk-of-the-backend"]
    assert [key for path, backend in backends.items() if path != best for key in backend.keys] == [None]
    with client_of(server, "sk-another-key-00") as client, pytest.raises(openai.AuthenticationError):
        ask(client, PROMPTS[0])
    assert not any("sk-" in line for line in server.said)


def test_backends_with_tls_are_held_against_their_authority(
    serve: Callable[..., GatewayServer], tmp_path: Path
) -> None:
    for name in ("certs", "others"):
        write_certificates(tmp_path / name, ["127.0.0.1"])
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(tmp_path / "certs" / "server.pem", tmp_path / "certs" / "server.key")
    with FakeBackend("model", tls) as backend:
        behind = {"0.0": backend}
        server = serve(behind, authority=tmp_path / "certs" / "ca.pem", offer={"partial": True})
        with client_of(server) as client:
            assert ask(client, PROMPTS[0])[:2] == (TEXT, "0.0")
        server = serve(behind, authority=tmp_path / "others" / "ca.pem", offer={"partial": True})
        with client_of(server) as client, pytest.raises(openai.InternalServerError, match="cannot be reached"):
            ask(client, PROMPTS[0])
        assert len(backend.asked) == 1


def test_a_drain_passes_on_what_is_open_and_refuses_the_rest(
    serve: Callable[..., GatewayServer], backends: Backends
) -> None:
    for backend in backends.values():
        backend.mode = "held"
    server = serve(offer={"running": 1})
    with client_of(server) as client:
        stream = client.completions.create(model="mix", prompt=PROMPTS[0], stream=True)
        pieces = [next(iter(stream)).choices[0].text]
        with pytest.raises(openai.RateLimitError, match="as many as may be at a time"):
            ask(client, "x")
        server.stop()
        server.until(lambda: server.gateway.admission.draining)
        assert got(server, "/readyz") == (503, "draining\n")
        with pytest.raises(openai.InternalServerError) as refused:
            ask(client, "x")
        assert (refused.value.status_code, refused.value.code) == (503, "server_draining")
        for backend in backends.values():
            backend.release.set()
        pieces += [chunk.choices[0].text for chunk in stream]
        assert "".join(pieces) == TEXT
        assert server.joined()


def test_a_second_signal_ends_at_once(serve: Callable[..., GatewayServer], backends: Backends) -> None:
    for backend in backends.values():
        backend.mode = "held"
    server = serve()
    with client_of(server) as client:
        stream = client.completions.create(model="mix", prompt=PROMPTS[0], stream=True)
        next(iter(stream))
        server.stop()
        server.stop()
        assert not server.joined()
        assert any(backend.hung_up.wait(60) for backend in backends.values() if backend.asked)
