"""The gRPC door: streams, statuses, reflection, health, keys, TLS for both doors, and who may listen where."""

from __future__ import annotations

import ssl
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs the extra `serve`")

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from inference.api_keys import UNREAD_S, ApiKeys, BadKeyFile
from inference.engine import Request
from inference.request_errors import BadKey
from inference.sampling import Sampling
from inference.server import CannotServe, Doors, Tls
from protocol import inference_pb2 as pb
from protocol import inference_pb2_grpc as pb_grpc
from protocol.certificates import write_certificates
from tests.inference.text_server import NAME, Held, TextServer, TinyModel


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return TinyModel.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def server(model: TinyModel) -> Iterator[TextServer]:
    with TextServer(model) as server:
        yield server


@pytest.fixture
def channel(server: TextServer) -> Iterator[Any]:
    with grpc.insecure_channel(str(server.opened.grpc)) as channel:
        yield channel


def test_a_stream_is_what_the_engine_writes_alone(model: TinyModel, channel: Any) -> None:
    request = Request(model.tokenizer.encode("stir"), 24, Sampling(0.7, 9, 0.9, seed=5), every=4)
    text, paths = model.alone(request)
    asked = pb.GenerateRequest(
        prompt="stir", max_tokens=24, temperature=0.7, top_k=9, top_p=0.9, seed=5, route="every:4"
    )
    replies = list(pb_grpc.GenerationStub(channel).Generate(asked))
    assert "".join(reply.text for reply in replies) == text
    ending = replies[-1].ending
    assert [each.path for each in ending.paths for _ in range(each.tokens)] == paths
    assert (ending.prompt_tokens, ending.completion_tokens, ending.route) == (4, len(paths), "every:4")
    assert not any(reply.HasField("ending") for reply in replies[:-1])


@pytest.mark.parametrize(
    ("fields", "status", "sentence"),
    [
        ({"model": "gpt-4"}, "NOT_FOUND", "there is no model 'gpt-4'"),
        ({"prompt": "x" * 200}, "INVALID_ARGUMENT", "the prompt has 200 tokens"),
        ({"max_tokens": 999}, "INVALID_ARGUMENT", "max_tokens is 999"),
        ({"temperature": -1.0}, "INVALID_ARGUMENT", "temperature is -1.0"),
        ({"top_p": 7.0}, "INVALID_ARGUMENT", "top_p is 7.0"),
        ({"stop": [""]}, "INVALID_ARGUMENT", "stop takes up to 16 strings"),
        ({"route": "oracle:sequence"}, "INVALID_ARGUMENT", "is for measuring"),
    ],
)
def test_what_cannot_be_answered_has_a_status(channel: Any, fields: dict[str, Any], status: str, sentence: str) -> None:
    asked = pb.GenerateRequest(**{"prompt": "x", **fields})
    with pytest.raises(grpc.RpcError) as refused:
        list(pb_grpc.GenerationStub(channel).Generate(asked))
    error: Any = refused.value
    assert error.code().name == status
    assert sentence in error.details()


def test_a_call_that_is_cancelled_frees_its_place(server: TextServer, channel: Any) -> None:
    call = pb_grpc.GenerationStub(channel).Generate(pb.GenerateRequest(prompt="x", seed=3, temperature=0.5))
    next(call)
    call.cancel()
    server.until(server.idle)


def test_models_and_what_reflection_tells(channel: Any) -> None:
    models = pb_grpc.GenerationStub(channel).ListModels(pb.ListModelsRequest()).models
    assert [model.path for model in models] == ["", "0.0", "0.1", "1.0", "1.1"]
    assert models[0].name == NAME
    database = ProtoReflectionDescriptorDatabase(channel)
    assert "dipaco.inference.v1.Generation" in database.get_services()
    found = database.FindFileContainingSymbol("dipaco.inference.v1.Generation")
    assert {"GenerateRequest", "GenerateReply"} <= {message.name for message in found.message_type}


def test_a_drain_shows_in_health(model: TinyModel) -> None:
    held = Held(model.engine())
    with TextServer(model, engine=held) as server, grpc.insecure_channel(str(server.opened.grpc)) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
        stub = pb_grpc.GenerationStub(channel)
        call = stub.Generate(pb.GenerateRequest(prompt="stir the onions", seed=5, max_tokens=24))
        next(call)
        server.stop()
        server.until(lambda: server.answering.draining)
        with pytest.raises(grpc.RpcError) as refused:
            list(stub.Generate(pb.GenerateRequest(prompt="x")))
        assert refused.value.code().name == "UNAVAILABLE"
        held.release.set()
        assert list(call)[-1].ending.completion_tokens > 1
        assert server.joined()


def test_both_doors_speak_tls_and_ask_for_a_key(model: TinyModel, tmp_path: Path) -> None:
    write_certificates(tmp_path / "certs", ["localhost"])
    tls = Tls(tmp_path / "certs" / "server.pem", tmp_path / "certs" / "server.key")
    keys = tmp_path / "keys"
    keys.write_text("sk-0123456789abcdef\n", encoding="utf-8")
    ca = tmp_path / "certs" / "ca.pem"
    with TextServer(model, tls=tls, keys=ApiKeys(keys)) as server:
        trust = ssl.create_default_context(cafile=str(ca))
        headers = {"Authorization": "Bearer sk-0123456789abcdef"}
        with urllib.request.urlopen(
            urllib.request.Request(f"{server.url}/models", headers=headers), context=trust, timeout=60
        ) as answer:
            assert answer.status == 200
        credentials = grpc.ssl_channel_credentials(ca.read_bytes())
        with grpc.secure_channel(str(server.opened.grpc), credentials) as channel:
            stub = pb_grpc.GenerationStub(channel)
            with pytest.raises(grpc.RpcError) as refused:
                stub.ListModels(pb.ListModelsRequest())
            assert refused.value.code().name == "UNAUTHENTICATED"
            metadata = (("authorization", "Bearer sk-0123456789abcdef"),)
            assert stub.ListModels(pb.ListModelsRequest(), metadata=metadata).models


def test_nobody_listens_beyond_this_machine_without_a_key(tmp_path: Path) -> None:
    with pytest.raises(CannotServe, match="no API key is asked for; give --api-key-file"):
        Doors("0.0.0.0:0").check()
    with pytest.raises(CannotServe, match=r"0\.0\.0\.0:1 is reachable"):
        Doors("127.0.0.1:0", "0.0.0.0:1").check()
    Doors("0.0.0.0:0", insecure=True).check()
    keys = tmp_path / "keys"
    keys.write_text("sk-0123456789abcdef\n", encoding="utf-8")
    Doors("0.0.0.0:0", keys=ApiKeys(keys)).check()
    with pytest.raises(CannotServe, match="are not a certificate and its key in PEM"):
        Doors("127.0.0.1:0", tls=Tls(keys, keys)).check()


@pytest.mark.parametrize(
    ("text", "sentence"), [("", "holds no API key"), ("# none\n\n", "holds no API key"), ("short\n", "fewer than 16")]
)
def test_a_file_without_keys_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BadKeyFile, match=sentence):
        ApiKeys(path)
    with pytest.raises(BadKeyFile, match="cannot be read"):
        ApiKeys(tmp_path / "nowhere")


def test_keys_follow_their_file(tmp_path: Path) -> None:
    path, now = tmp_path / "keys", [0.0]
    path.write_text("sk-0123456789abcdef\n", encoding="utf-8")
    keys = ApiKeys(path, clock=lambda: now[0])
    path.write_text("sk-a-newer-key-0001\n", encoding="utf-8")
    keys.check("Bearer sk-0123456789abcdef")  # not looked at yet
    now[0] = 2.0
    keys.check("Bearer sk-a-newer-key-0001")
    for wrong in ("Bearer sk-0123456789abcdef", "sk-a-newer-key-0001", "Basic sk-a-newer-key-0001", ""):
        with pytest.raises(BadKey):
            keys.check(wrong)


class Watched:
    """A file of keys in use, and its clock."""

    OLD, NEW = "sk-0123456789abcdef", "sk-a-newer-key-0001"

    def __init__(self, path: Path) -> None:
        self.path, self.now_s = path, 0.0
        self.path.write_text(f"{self.OLD}\n", encoding="utf-8")
        self.keys = ApiKeys(path, clock=lambda: self.now_s)

    def admits(self, key: str) -> bool:
        """As of two seconds later."""
        self.now_s += 2.0
        try:
            self.keys.check(f"Bearer {key}")
        except BadKey:
            return False
        return True


@pytest.mark.parametrize("text", ["", "# nobody\n", "  \n\n"])
def test_an_emptied_file_of_keys_admits_nobody_and_is_told(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    watched = Watched(tmp_path / "keys")
    watched.path.write_text(text, encoding="utf-8")
    assert not watched.admits(watched.OLD)
    assert "holds no API key any more: nobody is admitted" in caplog.text


def test_a_line_that_is_no_key_is_told_and_the_others_rule(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    watched = Watched(tmp_path / "keys")
    watched.path.write_bytes(f"# team\nshort\n{watched.NEW}\n\xff-not-a-key-of-anyone\n".encode("latin-1"))
    assert watched.admits(watched.NEW)
    assert not watched.admits(watched.OLD)
    assert not watched.admits("short")
    assert caplog.text.count("the key in line 2 has fewer than 16 characters") == 1
    assert caplog.text.count("the key in line 4 holds spaces or characters beyond ASCII") == 1


def test_a_file_of_keys_that_is_gone_holds_for_a_while_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    watched = Watched(tmp_path / "keys")
    watched.path.unlink()
    assert watched.admits(watched.OLD)
    assert caplog.text.count("its last keys hold for 60 s") == 1
    watched.now_s += UNREAD_S - 4.0
    assert watched.admits(watched.OLD)
    watched.now_s += 4.0
    assert not watched.admits(watched.OLD)
    assert "nobody is admitted until it can" in caplog.text
    watched.path.write_text(f"{watched.NEW}\n", encoding="utf-8")
    assert watched.admits(watched.NEW)
    assert not watched.admits(watched.OLD)


def test_an_indented_comment_is_no_key(tmp_path: Path) -> None:
    watched = Watched(tmp_path / "keys")
    watched.path.write_text(f"  # of the whole team\n{watched.OLD}\n", encoding="utf-8")
    assert not watched.admits("# of the whole team")
    assert watched.admits(watched.OLD)
