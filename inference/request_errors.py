"""Why a server answers a request with an error: one exception a cause, and the ONE table of their HTTP statuses.

Shapes and codes are those that clients of the OpenAI API know; the gRPC service has statuses for the same ones.
"""

from __future__ import annotations

from typing import Any

from inference.engine import NoRouterLM, PromptTooLong
from inference.sampling import BadSampling
from inference.stream import UnknownToken
from model.topology import UnknownPath


class BadRequest(ValueError):
    """A request that cannot be answered as it is. `param` names the field, `code` the kind of mistake."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code


class UnknownModel(BadRequest):
    """A model name that this server does not serve."""


class BadKey(BadRequest):
    """The API key is missing or unknown."""


class BodyTooLarge(BadRequest):
    """More bytes than a request may have."""


class Busy(RuntimeError):
    """All places, and the queue, are taken; worth trying again after `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Draining(Busy):
    """The server ends and takes nothing new."""


class NotReady(Busy):
    """The server cannot answer anything until somebody mends it."""


class EngineFailed(RuntimeError):
    """A generation broke in the middle; the server's log says more."""


class NoPathAnswers(Busy):
    """The backends of all paths that were asked failed."""


class BackendLost(EngineFailed):
    """A backend broke off in the middle of its answer."""


STATUS_OF: dict[type[Exception], int] = {
    BadRequest: 400,
    BadKey: 401,
    UnknownModel: 404,
    BodyTooLarge: 413,
    Busy: 429,
    Draining: 503,
    NotReady: 503,
    EngineFailed: 500,
    NoPathAnswers: 503,
    # from the engine
    PromptTooLong: 400,
    NoRouterLM: 400,
    BadSampling: 400,
    UnknownToken: 400,
    UnknownPath: 404,
}
_TYPE_OF = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
_CODE_OF: dict[type[Exception], str] = {
    BadKey: "invalid_api_key",
    UnknownModel: "model_not_found",
    UnknownPath: "model_not_found",
    PromptTooLong: "context_length_exceeded",
    BodyTooLarge: "request_too_large",
    Busy: "rate_limit_exceeded",
    Draining: "server_draining",
    NotReady: "server_not_ready",
    NoPathAnswers: "no_path_answers",
    BackendLost: "backend_lost",
}


def status_of(error: Exception) -> int | None:
    """The HTTP status of an exception; None where it is a bug of ours."""
    return next((STATUS_OF[kind] for kind in type(error).__mro__ if kind in STATUS_OF), None)


def error_body(error: Exception) -> dict[str, Any]:
    """The body of the answer, in OpenAI's shape; of a bug it tells no more than that there was one."""
    status = status_of(error)
    kind = next((kind for kind in type(error).__mro__ if kind in _CODE_OF), None)
    code = getattr(error, "code", None) or (_CODE_OF[kind] if kind else None)
    message = str(error) if status else "the server failed; its log says more"
    param = getattr(error, "param", None)
    return {
        "error": {
            "message": _encodable(message),
            "type": _TYPE_OF.get(status or 500, "invalid_request_error"),
            "param": param and _encodable(param),
            "code": code,
        }
    }


def _encodable(text: str) -> str:
    """The text as UTF-8 can hold it: what a client sends may have halves of surrogate pairs."""
    return text.encode("utf-8", "backslashreplace").decode()


def retry_after_s(error: Exception) -> int | None:
    """After how many seconds the same request is worth trying again, where it is."""
    return error.retry_after_s if isinstance(error, Busy) else None
