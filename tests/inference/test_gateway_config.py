"""The backends of a gateway: what the file and the flags may say, one sentence for each mistake; events in pieces."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="needs the extra `serve`")

from configs.load import InvalidConfig
from inference.gateway_config import BadBackend, Target, read_config, targets
from inference.gateway_events import MAX_EVENT_BYTES, BadEvents, EventSplitter, data_of

PATHS = ("0.0", "0.1", "0.10")
FLAGS = [f"{path}=m@http://127.0.0.1:1/v1" for path in PATHS]


def read(folder: Path, text: str, *flags: str, partial: bool = False) -> tuple[Target | None, ...]:
    file = folder / "backends.yaml"
    file.write_text(text, encoding="utf-8")
    return targets(read_config(file, flags), PATHS, {"KEY": "sk-1", "EMPTY": " "}, partial=partial)


def test_a_file_and_flags_name_a_backend_for_every_path(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk-2\n", encoding="utf-8")
    text = """
    cool_down_s: 2.5
    backends:
      0.0: {url: https://localhost:8001/v1/, model: first, api_key_env: KEY}
      0.10: {url: "http://127.0.0.1:8003/v1", model: 12, api_key_file: key}
    """
    found = read(tmp_path, text, "0.1=org/model@2@http://127.0.0.1:8002/v1")
    assert [(each.path, each.url, each.model, each.key) for each in found if each] == [
        ("0.0", "https://localhost:8001/v1", "first", "sk-1"),
        ("0.1", "http://127.0.0.1:8002/v1", "org/model@2", None),
        ("0.10", "http://127.0.0.1:8003/v1", "12", "sk-2"),
    ]
    assert "sk-" not in repr(found)
    assert read_config(tmp_path / "backends.yaml").patience.cool_down_s == 2.5


def test_a_path_may_have_no_backend_with_partial_only() -> None:
    config = read_config(None, FLAGS[:1])
    assert [each is None for each in targets(config, PATHS, {}, partial=True)] == [False, True, True]
    with pytest.raises(BadBackend, match=r"path 0\.1 has no backend \(2 of 3 have none\).*--partial"):
        targets(config, PATHS, {})


ONE = "url: http://127.0.0.1:1/v1, model: m"


@pytest.mark.parametrize(
    ("text", "flags", "sentence"),
    [
        ("backends: {}", (), "no path has a backend"),
        ("[]", (), "expected a mapping with the key 'backends'"),
        ("backends: {7.7: {" + ONE + "}}", (), "backend '7.7' is of no path of the router, which has 0.0, 0.1, 0.10"),
        ("backends: {0.0: {" + ONE + "}, 0.0: {" + ONE + "}}", (), "key '0.0' stands here a second time"),
        ("backends: {0.0: {" + ONE + "}}", FLAGS, "path 0.0 has two backends"),
        ("backends: {0.0: {model: m}}", (), "key backends.0.0.url is missing"),
        ("backends: {0.0: {" + ONE + ", api_key: sk-1}}", (), "unknown key backends.0.0.api_key"),
        ("backnds: {}", (), "did you mean 'backends'?"),
        ("{backends: {}, probe_s: 0}", (), 'probe_s is "0", expected a value above 0'),
        ("{backends: {}, probe_s: soon}", (), 'probe_s is "soon", expected a number'),
        ("backends: {0.0: {url: 'localhost:8001', model: m}}", FLAGS[1:], "is none of an HTTP server"),
        ("backends: {0.0: {url: 'http://', model: m}}", FLAGS[1:], "is none of an HTTP server"),
        ("backends: {0.0: {url: 'http://localhost:x/v1', model: m}}", FLAGS[1:], "is none: Port could not be cast"),
        ("backends: {0.0: {url: 'http://localhost/v1?a=b', model: m}}", FLAGS[1:], "has more than scheme"),
        ("backends: {0.0: {url: 'http://localhost:pw@127.0.0.1', model: m}}", FLAGS[1:], "keys go into api_key_file"),
        ("backends: {0.0: {" + ONE + ", api_key_env: NO}}", FLAGS[1:], "the environment variable NO holds no API key"),
        ("backends: {0.0: {" + ONE + ", api_key_env: EMPTY}}", FLAGS[1:], "variable EMPTY holds no API key"),
        ("backends: {0.0: {" + ONE + ", api_key_file: none}}", FLAGS[1:], "none cannot be read"),
        ("backends: {0.0: {" + ONE + ", api_key_file: k, api_key_env: KEY}}", FLAGS[1:], "give one of them"),
        ("backends: {0.0: {" + ONE + ", ca_file: ca.pem}}", FLAGS[1:], "has a ca_file and no TLS"),
        (
            "backends: {0.0: {url: 'https://localhost/v1', model: m, ca_file: none}}",
            FLAGS[1:],
            "no certificates in PEM",
        ),
        ("backends: {}", ("0.0=http://localhost/v1",), "is not PATH=MODEL@URL"),
        ("backends: {}", ("0.0=m@ftp://localhost/v1",), "is not PATH=MODEL@URL"),
    ],
)
def test_every_mistake_has_its_sentence(tmp_path: Path, text: str, flags: tuple[str, ...], sentence: str) -> None:
    with pytest.raises((BadBackend, InvalidConfig)) as refused:
        read(tmp_path, text, *flags)
    assert sentence in str(refused.value)
    assert "pw" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_events_are_whole_however_the_bytes_come() -> None:
    stream = b"data: a\n\n: ping\r\n\r\nevent: x\r\ndata: b\r\ndata: c\r\n\r\ndata: [DONE]\n\ndata: cut"
    for size in (1, 2, 3, 7, 100):
        splitter, events = EventSplitter(), []
        for start in range(0, len(stream), size):
            events += splitter.feed(stream[start : start + size])
        assert [data_of(event) for event in events] == [b"a", None, b"b\nc", b"[DONE]"]
        assert b"".join(events) == stream.removesuffix(b"data: cut")
        assert splitter.end() == []
    splitter = EventSplitter()
    assert splitter.feed(b"data: [DONE]\n") == []
    assert splitter.end() == [b"data: [DONE]\n\n"]
    with pytest.raises(BadEvents, match="more than"):
        EventSplitter().feed(b"x" * (MAX_EVENT_BYTES + 1))
