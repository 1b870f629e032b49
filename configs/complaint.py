"""One sentence for what pydantic found wrong with a configuration: the key, the value, what was expected."""

from __future__ import annotations

import difflib
import json
import typing
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from configs.schema import Config

Keys = tuple[int | str, ...]


def complaint(errors: list[ErrorDetails], data: Any, schema: type[BaseModel] = Config) -> str:
    """The first key that is wrong, all alternatives of its type joined, and how many more keys are wrong.

    `schema`: what the data was held against, whose keys an unknown one may have meant.
    An unknown key comes first: it often is the misspelt form of one that seems to be missing.
    """
    errors = sorted(errors, key=lambda error: error["type"] != "extra_forbidden")
    places = [_walk(error["loc"], data) for error in errors]
    first, error, key = places[0], errors[0], _dotted(places[0])
    rest = len(set(places)) - 1
    more = f" (and {rest} more wrong {'key' if rest == 1 else 'keys'})" if rest else ""
    if error["type"] == "extra_forbidden":
        return f"unknown key {key} (value {shown(error['input'])}){_suggestion(first, schema)}{more}"
    if error["type"] == "missing":
        return f"key {key} is missing{more}"
    if error["type"] == "union_tag_not_found":
        return f"key {key}.kind is missing{more}"
    if error["type"] == "value_error":
        return f"{key + ': ' if key else ''}{error['msg'].removeprefix('Value error, ')}{more}"
    value = error["input"]
    if error["type"] == "union_tag_invalid":
        key, value = f"{key}.kind", error["ctx"]["tag"]
    expected = dict.fromkeys(_expectation(each) for each, place in zip(errors, places, strict=True) if place == first)
    return f"{key} is {shown(value)}, expected {' or '.join(expected)}{more}"


def shown(value: Any) -> str:
    """A value as the file would have it, cut to a readable length."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _walk(location: Keys, data: Any) -> Keys:
    """The keys of `location` as the file has them: without the tags that pydantic adds for alternatives of a type."""
    keys: list[int | str] = []
    for index, part in enumerate(location):
        last = index == len(location) - 1
        if isinstance(data, dict) and (part in data or (last and part != data.get("kind"))):
            keys.append(part)
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            keys.append(part)
            data = data[part]
    return tuple(keys)


def _dotted(keys: Keys) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).removeprefix(".")


_TYPES = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "model_type": "a mapping",
    "dict_type": "a mapping",
}
_BOUNDS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}


def _expectation(error: ErrorDetails) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind in _TYPES:
        return _TYPES[kind]
    if kind in _BOUNDS:
        word, name = _BOUNDS[kind]
        return f"a value {word} {context[name]}"
    if kind in ("literal_error", "union_tag_invalid"):
        choices = str(context.get("expected", context.get("expected_tags")))
        return f"one of {choices}" if "', '" in choices or " or " in choices else choices
    if kind == "string_pattern_mismatch":
        return f"text of the form {context['pattern'].strip('^$')}"
    return error["msg"].removeprefix("Input should be ")


def _suggestion(keys: Keys, schema: type[BaseModel]) -> str:
    """The key that was probably meant, among all keys of the schema."""
    near = difflib.get_close_matches(str(keys[-1]), sorted(_known_keys(schema)), n=1, cutoff=0.75)
    return f"; did you mean {near[0]!r}?" if near else ""


def _known_keys(section: type[BaseModel]) -> set[str]:
    names = set(section.model_fields)
    for field in section.model_fields.values():
        for part in _sections(field.annotation):
            names |= _known_keys(part)
    return names


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The sections that an annotation is made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [part for argument in typing.get_args(annotation) for part in _sections(argument)]
