"""What is taken from an installed file: docstrings as prose, code without them, sources without legal headers.

Works on text with regular expressions, so that files of any version of Python can be read and none is executed.
"""

from __future__ import annotations

import ast
import inspect
import re

_DOCSTRING = re.compile(
    r"(?P<before>\A(?:[ \t]*(?:\#[^\n]*)?\n)*|:[ \t]*(?:\#[^\n]*)?\n(?:[ \t]*(?:\#[^\n]*)?\n)*)"
    r'(?P<indent>[ \t]*)[rRuU]?(?P<quotes>"""|\'\'\')(?P<body>.*?)(?<!\\)(?P=quotes)[ \t]*(?:\#[^\n]*)?(?:\n|\Z)',
    re.DOTALL,
)
_HASH_HEADER = re.compile(r"\A(?:[ \t]*(?:#[^\n]*)?\n)+")
_SLASH_HEADER = re.compile(r"\A\s*(?:/\*.*?\*/[ \t]*\n|(?://[^\n]*\n)+)", re.DOTALL)
_GUARD = re.compile(r"\A#if !defined\(TORCH_STABLE_ONLY\)[^\n]*\n")
_GENERATED = re.compile(r"@generated|automatically generated|auto-generated|do not edit", re.IGNORECASE)
_LEGAL = re.compile(r"copyright|licen[sc]e|spdx|all rights reserved", re.IGNORECASE)
_SHORTEST_DOCSTRING = 80
_LONGEST_LINE = 2_000
_OPENING_CHARACTERS = 1_000


def docstrings(source: str) -> str:
    """The docstrings of a Python file as prose, one paragraph after the other, without indentation."""
    bodies = (inspect.cleandoc(match["body"]) for match in _DOCSTRING.finditer(source))
    return "\n\n".join(body for body in bodies if len(body) >= _SHORTEST_DOCSTRING)


def code(source: str) -> str:
    """A Python or Cython file, or a stub, without its docstrings and without a legal header."""

    def without(match: re.Match[str]) -> str:
        following = re.match(r"(?:[ \t]*\n)*([ \t]*)\S", source[match.end() : match.end() + 400])
        alone = match["indent"] and (following is None or len(following[1]) < len(match["indent"]))
        return match["before"] + (f"{match['indent']}...\n" if alone else "")

    return without_legal_header(_DOCSTRING.sub(without, source))


def without_legal_header(source: str) -> str:
    """A source file without its leading comment where that is about copyright: it would open every document."""
    source = _GUARD.sub("", source)
    for header in (_HASH_HEADER, _SLASH_HEADER):
        match = header.match(source)
        if match is not None and _LEGAL.search(match[0]):
            return source[match.end() :].lstrip("\n")
    return source


def description(metadata: str) -> str:
    """The long description in a package's METADATA: what follows the headers."""
    return metadata.partition("\n\n")[2]


def help_topics(source: str) -> str:
    """The language reference that `help()` shows, from the dictionary of strings in pydoc_data/topics.py."""
    try:
        body = ast.parse(source).body
        values = next(node.value for node in body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict))
        return "\n\n\n".join(str(text).strip() for text in ast.literal_eval(values).values())
    except (SyntaxError, ValueError, StopIteration):
        return ""


def reads_like_text(text: str) -> bool:
    """Whether the text is mostly words: no tables of numbers, no data in one endless line."""
    words = sum(character.isalpha() or character.isspace() for character in text)
    return 2 * words > len(text) and max(map(len, text.split("\n"))) <= _LONGEST_LINE


def is_generated(source: str) -> bool:
    """Whether a file says at its beginning that a program wrote it."""
    return _GENERATED.search(source[:_OPENING_CHARACTERS]) is not None


def plain(source: str) -> str:
    """A text as it stands."""
    return source
