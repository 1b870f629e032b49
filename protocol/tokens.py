"""The tokens that admit to a run, as their SHA-256: the current one, and replaced ones that end or have ended.

A token has 256 random bits, so that a plain hash does not give it away; hashes are compared in constant time. Kept as
text, one token a line: the current hash, then `hash end` with the end in seconds since 1970.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field
from typing import Literal

# Replaced tokens that are remembered, so that whoever still presents one is told what has happened.
MAX_RETIRED = 16
# The end of a token that has none yet: it is admitted beside the current one until a rotation decides on it.
NO_END_S = 1e11
_LINE = re.compile(r"^([0-9a-f]{64})(?: (\d+(?:\.\d+)?))?$")

Standing = Literal["current", "ending", "ended", "unknown"]


class BadTokenFile(ValueError):
    """A token file that is none."""


def new_token() -> str:
    """A token that nobody can guess."""
    return secrets.token_urlsafe(32)


def token_sha256(token: str) -> str:
    """How a token stands in the file."""
    return hashlib.sha256(token.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Tokens:
    """`current`, and `retired` ones with the time (seconds since 1970) at which each ends, newest first; all hashed."""

    current: str = field(repr=False)
    retired: tuple[tuple[str, float], ...] = field(default=(), repr=False)

    @classmethod
    def parse(cls, text: str) -> Tokens:
        """From the file's text; raises BadTokenFile."""
        found = [_LINE.match(line) for line in text.splitlines() if line.strip()]
        lines = [each for each in found if each is not None]
        if not lines or len(lines) < len(found) or lines[0][2] or not all(each[2] for each in lines[1:]):
            raise BadTokenFile("the token file is damaged; `dipaco certs RUN --rotate-token` writes a new one")
        return cls(lines[0][1], tuple((each[1], float(each[2])) for each in lines[1:]))

    def text(self) -> str:
        """The file's text."""
        return "".join(f"{line}\n" for line in (self.current, *(f"{old} {end:.3f}" for old, end in self.retired)))

    def announced(self, token: str) -> Tokens:
        """With `token` admitted beside the others, if it is new: it may be handed out before a rotation to it."""
        new = token_sha256(token)
        if new == self.current or new in dict(self.retired):
            return self
        return Tokens(self.current, ((new, NO_END_S), *self.retired)[:MAX_RETIRED])

    def rotated(self, token: str, ends_s: float) -> Tokens:
        """With `token` as the current one, and the one before valid until `ends_s`; no older one outlives that."""
        new = token_sha256(token)
        older = tuple((old, min(end, ends_s)) for old, end in self.retired if old != new)
        return Tokens(new, ((self.current, ends_s), *older)[:MAX_RETIRED])

    def standing(self, token: str, now_s: float) -> Standing:
        """What a presented token is worth. Every hash is compared, so that the time taken tells nothing."""
        presented = token_sha256(token).encode()
        ends = [end for old, end in self.retired if hmac.compare_digest(presented, old.encode())]
        if hmac.compare_digest(presented, self.current.encode()):
            return "current"
        if not ends:
            return "unknown"
        return "ending" if now_s < max(ends) else "ended"
