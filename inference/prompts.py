"""The prompts in the body of a request: a text, token ids, or a list of either, told apart by the first element.

Lengths are looked at before elements, and elements once, so that a body of any shape is judged in milliseconds.
"""

from __future__ import annotations

import json

from inference.request_errors import BadRequest

_SHOWN_ITEMS = 8


def prompts_of(prompt: object, most_tokens: int, most_prompts: int) -> tuple[str | tuple[int, ...], ...]:
    """The prompts of a JSON value, each at most `most_tokens` where it is token ids; raises BadRequest.

    Texts have to be tokenized before their length is known: that is the caller's.
    """
    if isinstance(prompt, str):
        return (text_of(prompt, "prompt"),)
    if not isinstance(prompt, list):
        raise BadRequest(f"prompt is {_shown(prompt)}, expected a text, token ids, or a list of either", "prompt")
    if not prompt:
        raise BadRequest("prompt is an empty list, expected at least one prompt", "prompt")
    if _is_id(prompt[0]):
        return (_ids(prompt, most_tokens),)
    if len(prompt) > most_prompts:
        raise BadRequest(f"{len(prompt)} prompts are given, this server answers {most_prompts} at a time", "prompt")
    if isinstance(prompt[0], list):
        return tuple(_ids(each, most_tokens) for each in prompt)
    return tuple(text_of(each, "prompt") for each in prompt)


def text_of(text: object, name: str) -> str:
    """The text itself, which is in the field `name`; raises BadRequest where it is none or UTF-8 cannot hold it."""
    if not isinstance(text, str):
        raise BadRequest(f"{name} has {_shown(text)} among its texts", name)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRequest(f"{name} is no text: it holds half of a surrogate pair at {error.start}", name) from None
    return text


def _ids(tokens: object, most_tokens: int) -> tuple[int, ...]:
    if not isinstance(tokens, list):
        raise BadRequest(f"prompt has {_shown(tokens)} among its lists of token ids", "prompt")
    if len(tokens) > most_tokens:
        raise BadRequest(
            f"the prompt has {len(tokens)} tokens, this server takes {most_tokens} tokens; shorten it",
            "prompt",
            "context_length_exceeded",
        )
    wrong = [token for token in tokens if not _is_id(token) or token < 0]
    if wrong:
        raise BadRequest(
            f"prompt has {_shown(wrong[0])} among its token ids, expected whole numbers from 0 on", "prompt"
        )
    return tuple(tokens)


def _is_id(token: object) -> bool:
    return type(token) is int  # true and false are no ids


def _shown(value: object) -> str:
    """The beginning of a value, as JSON, without writing all of a long one."""
    if isinstance(value, list):
        value = value[:_SHOWN_ITEMS]
    elif isinstance(value, dict):
        value = {name: value[name] for name in list(value)[:_SHOWN_ITEMS]}
    return json.dumps(value)[:80]
