"""A small backend of the OpenAI API that behaves well or badly as a test tells it, on a free port in a thread."""

from __future__ import annotations

import json
import socket
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

WORDS = ("one ", "two ", "three ", "four ")


class FakeBackend:
    """Serves `model`; `mode` says how it answers completions from now on.

    ok; a status like 500; dies (no answer); headers (and no body); half (two events, then the connection breaks); early
    (two events and a proper end, but no [DONE]); held (two events, the rest once `release` is set); nonsense.
    """

    def __init__(self, model: str, tls: ssl.SSLContext | None = None) -> None:
        self.model, self.mode, self._tls = model, "ok", tls
        self.models_status = 200
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.release, self.hung_up = threading.Event(), threading.Event()
        self._server: ThreadingHTTPServer | None = None
        self._port = 0

    @property
    def url(self) -> str:
        return f"{'http' if self._tls is None else 'https'}://127.0.0.1:{self._port}/v1"

    def start(self) -> None:
        """Listen, again on the same port."""
        backend = self

        class Handler(_Handler):
            fake = backend

        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._server.daemon_threads = True
        if self._tls is not None:
            self._server.socket = self._tls.wrap_socket(self._server.socket, server_side=True)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """As a killed process: nothing listens any more."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def __enter__(self) -> FakeBackend:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release.set()
        self.stop()


class _Handler(BaseHTTPRequestHandler):
    fake: FakeBackend

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        listed = {"object": "list", "data": [{"id": self.fake.model, "object": "model"}]}
        self._json(self.fake.models_status, listed)

    def do_POST(self) -> None:
        fake = self.fake
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        fake.asked.append(body)
        fake.keys.append(self.headers.get("authorization"))
        if fake.mode == "dies":
            self._break()
        elif fake.mode == "nonsense":
            self._json(200, ["what"])
        elif fake.mode.isdigit():
            self._json(int(fake.mode), {"error": {"message": f"a {fake.mode} of the backend", "code": None}})
        elif body.get("stream"):
            self._stream()
        elif fake.mode == "headers":
            self.send_response(200)
            self.send_header("content-length", "100")
            self.end_headers()
            self._break()
        else:
            self._json(200, self._completion("".join(WORDS), "stop", usage=True))

    def _stream(self) -> None:
        fake = self.fake
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.end_headers()
        if fake.mode == "headers":
            self._break()
            return
        try:
            for number, word in enumerate(WORDS):
                if number == 2 and fake.mode in ("half", "early"):
                    if fake.mode == "half":
                        self.wfile.write(b'data: {"choices": [{"te')
                        self._break()
                    return
                if number == 2 and fake.mode == "held":
                    self._until_released()
                last = number == len(WORDS) - 1
                self._event(json.dumps(self._completion(word, "stop" if last else None)))
            self._event("[DONE]")
        except OSError:
            fake.hung_up.set()

    def _until_released(self) -> None:
        """Notices, as a good backend does, that nobody listens any more."""
        while not self.fake.release.wait(0.01):
            self.connection.settimeout(0.01)
            try:
                if self.connection.recv(1, socket.MSG_PEEK) == b"":
                    raise ConnectionResetError
            except TimeoutError:
                pass
            finally:
                self.connection.settimeout(None)

    def _completion(self, text: str, finish: str | None, usage: bool = False) -> dict[str, Any]:
        choice = {"index": 0, "text": text, "finish_reason": finish, "logprobs": None}
        told = {"usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}} if usage else {}
        head = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": self.fake.model}
        return {**head, "choices": [choice], **told}

    def _event(self, data: str) -> None:
        self.wfile.write(f"data: {data}\n\n".encode())
        self.wfile.flush()

    def _json(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        if status == 429:
            self.send_header("retry-after", "30")
        self.end_headers()
        self.wfile.write(data)

    def _break(self) -> None:
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True
