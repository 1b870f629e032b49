"""Who is let in with a call: the rule on its token and on its client certificate. Pure: the time is an argument.

A token that was replaced is exchanged for the new one until it ends, so that running workers follow a rotation by
themselves. After a leak it must therefore end at once (`--overlap-s 0`), and then it is exchanged for nothing.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field

from protocol.errors import Forbidden, NotAllowed
from protocol.peer import Peer
from protocol.tokens import Tokens

SCHEME = "Bearer "


@dataclass(frozen=True, slots=True)
class Admission:
    """The tokens, the newest one as it is handed out (empty: never), when certificates were revoked, by serial number,
    and whether a call needs one.
    """

    tokens: Tokens
    newest_token: str = field(default="", repr=False)
    revoked: Mapping[str, datetime.datetime] = field(default_factory=dict)
    require_certificates: bool = False

    def check(self, authorization: str | bytes, peer: Peer | None, now_s: float) -> str:
        """Let a call in, with the value of its `authorization` metadata, at `now_s` (seconds since 1970), or raise.

        Returns the token that the caller should use from now on; empty where it has it. Raises NotAllowed, and
        Forbidden where the certificate is revoked or over.
        """
        self._check_peer(peer, now_s)
        text = authorization if isinstance(authorization, str) else authorization.decode("latin-1")
        if not text:
            raise NotAllowed("the join token is missing; use the run's join file")
        standing = self.tokens.standing(text.removeprefix(SCHEME), now_s) if text.startswith(SCHEME) else "unknown"
        if standing == "unknown":
            raise NotAllowed("the join token is wrong; use the run's join file")
        if standing == "ended":
            raise NotAllowed("the join token was replaced and has ended; copy the run's new join file to this machine")
        return self.newest_token if standing == "ending" else ""

    def _check_peer(self, peer: Peer | None, now_s: float) -> None:
        if peer is None:
            if self.require_certificates:
                raise NotAllowed(certificate_needed("this run"))
            return
        revoked = self.revoked.get(peer.serial)
        if revoked is not None:
            raise Forbidden(
                f"the certificate of {peer.name!r} (serial {peer.serial}) was revoked on {revoked:%Y-%m-%d %H:%M} UTC; "
                "ask who runs the coordinator for a new join file"
            )
        if now_s >= peer.expires.timestamp():
            raise Forbidden(
                f"the certificate of {peer.name!r} ended on {peer.expires:%Y-%m-%d %H:%M} UTC; "
                f"`dipaco certs RUN --worker {peer.name}` issues a new one"
            )


def certificate_needed(who: str) -> str:
    """What a worker without a certificate is told."""
    return (
        f"{who} requires a certificate of each worker's own (execution.require_worker_certificates); "
        "join with the file that `dipaco certs RUN --worker NAME` writes for this machine"
    )
