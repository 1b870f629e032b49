"""The answers of the OpenAI API, whole and in chunks: completions, chat completions, models. Pure dictionaries.

The extension field `dipaco` of every choice names the paths that wrote it; that of an answer, its route.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from inference.answering import Answer, Piece, Segment
from inference.served_model import BASE_MODEL_NOTE, ServedModel


def answer_body(
    answer: Answer, texts: Sequence[str], finishes: Sequence[str], answer_id: str, now_s: int
) -> dict[str, Any]:
    """The whole answer."""
    chat = answer.asked.chat
    choices = []
    for index, (text, finish) in enumerate(zip(texts, finishes, strict=True)):
        content = {"message": {"role": "assistant", "content": text, "refusal": None}} if chat else {"text": text}
        choices.append(
            {
                "index": index,
                **content,
                "logprobs": None,
                "finish_reason": finish,
                "dipaco": {"paths": paths_of(answer.segments(index))},
            }
        )
    return {**_head(answer, answer_id, now_s, ""), "choices": choices, "usage": usage(answer)}


def first_chunks(answer: Answer, answer_id: str, now_s: int) -> list[dict[str, Any]]:
    """What precedes the text of a stream: the role of a chat's answer."""
    if not answer.asked.chat:
        return []
    indices = range(len(answer.asked.prompts) * answer.asked.n)
    delta = {"role": "assistant", "content": ""}
    return [
        _chunk(answer, answer_id, now_s, {"index": index, "delta": delta, "finish_reason": None}) for index in indices
    ]


def piece_chunk(answer: Answer, piece: Piece, answer_id: str, now_s: int) -> dict[str, Any]:
    """A piece of text in a stream, with the path that wrote it; the last one of a text names all its paths."""
    content = {"delta": {"content": piece.text} if piece.text else {}} if answer.asked.chat else {"text": piece.text}
    told: dict[str, Any] = {"path": piece.path}
    if piece.finish is not None:
        told["paths"] = paths_of(answer.segments(piece.index))
    choice = {"index": piece.index, **content, "logprobs": None, "finish_reason": piece.finish, "dipaco": told}
    return _chunk(answer, answer_id, now_s, choice)


def usage_chunk(answer: Answer, answer_id: str, now_s: int) -> dict[str, Any]:
    """The last chunk of a stream whose client asked for it."""
    return {**_head(answer, answer_id, now_s, ".chunk"), "choices": [], "usage": usage(answer)}


def usage(answer: Answer) -> dict[str, int]:
    """Tokens; a token that ended a text is counted, too."""
    prompt, completion = answer.prompt_tokens, answer.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def models_body(model: ServedModel) -> dict[str, Any]:
    """The mixture and each of its paths."""
    return {"object": "list", "data": [model_body(model, name) for name in model.names]}


def model_body(model: ServedModel, name: str) -> dict[str, Any]:
    """One model; raises UnknownModel."""
    model.check_name(name)
    path = name.removeprefix(f"{model.name}/") if name != model.name else None
    told = {"path": path, "base_model": True, "note": BASE_MODEL_NOTE, "snapshot": model.snapshot}
    return {"id": name, "object": "model", "created": model.created_s, "owned_by": "dipaco", "dipaco": told}


def paths_of(segments: Sequence[Segment]) -> list[dict[str, Any]]:
    return [{"path": segment.path, "tokens": segment.tokens} for segment in segments]


def _chunk(answer: Answer, answer_id: str, now_s: int, choice: dict[str, Any]) -> dict[str, Any]:
    last = {"usage": None} if answer.asked.include_usage else {}
    return {**_head(answer, answer_id, now_s, ".chunk"), "choices": [choice], **last}


def _head(answer: Answer, answer_id: str, now_s: int, chunk: str) -> dict[str, Any]:
    """What answers and chunks share; the chunks of completions have the name of the whole."""
    return {
        "id": answer_id,
        "object": f"chat.completion{chunk}" if answer.asked.chat else "text_completion",
        "created": now_s,
        "model": answer.asked.model,
        "system_fingerprint": answer.snapshot,
        "dipaco": {"route": answer.routing.name, "base_model": True, "note": BASE_MODEL_NOTE},
    }
