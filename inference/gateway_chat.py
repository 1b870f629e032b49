"""A backend's completion as the chat completion that was asked for: whole, and chunk by chunk. Pure dictionaries.

The bodies are the gateway's own: their extension field `dipaco` names the path that answered and the first choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from inference.served_model import BASE_MODEL_NOTE


class NoCompletion(ValueError):
    """A backend's answer that is no completion of the OpenAI API."""


@dataclass
class ChatAnswer:
    """The head of one answer, and which of its texts have begun."""

    answer_id: str
    created_s: int
    model: str
    path: str
    first_choice: str
    _begun: set[int] = field(default_factory=set)

    def whole(self, completion: Mapping[str, Any]) -> dict[str, Any]:
        """The body; raises NoCompletion."""
        choices = []
        for choice in _choices(completion):
            message = {"role": "assistant", "content": _text(choice), "refusal": None}
            choices.append({**_common(choice), "message": message})
        if not choices:
            raise NoCompletion("answered with no text")
        return {**self._head("chat.completion", completion), "choices": choices, "usage": completion.get("usage")}

    def chunks(self, completion: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The chunks that a chunk becomes: before the first text of each choice, its role. Raises NoCompletion."""
        head, found = self._head("chat.completion.chunk", completion), []
        usage = {"usage": completion["usage"]} if "usage" in completion else {}
        choices = _choices(completion)
        for choice in choices:
            common = _common(choice)
            if common["index"] not in self._begun:
                self._begun.add(common["index"])
                role = {"role": "assistant", "content": ""}
                found.append({**head, "choices": [{**common, "delta": role, "finish_reason": None}]})
            text = _text(choice)
            if text or common["finish_reason"] is not None:
                found.append({**head, "choices": [{**common, "delta": {"content": text} if text else {}}], **usage})
        if not choices and usage:
            found.append({**head, "choices": [], **usage})
        return found

    def _head(self, kind: str, completion: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "id": self.answer_id,
            "object": kind,
            "created": self.created_s,
            "model": self.model,
            "system_fingerprint": completion.get("system_fingerprint"),
            "dipaco": {
                "path": self.path,
                "first_choice": self.first_choice,
                "base_model": True,
                "note": BASE_MODEL_NOTE,
            },
        }


def _choices(completion: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    choices = completion.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise NoCompletion("answered with something that is no completion")
    return choices


def _common(choice: Mapping[str, Any]) -> dict[str, Any]:
    told = {"dipaco": choice["dipaco"]} if "dipaco" in choice else {}
    index = choice.get("index", 0)
    if not isinstance(index, int):
        raise NoCompletion("answered with a text whose index is no number")
    return {"index": index, "logprobs": None, "finish_reason": choice.get("finish_reason"), **told}


def _text(choice: Mapping[str, Any]) -> str:
    text = choice.get("text", "")
    if not isinstance(text, str):
        raise NoCompletion("answered with a text that is none")
    return text
