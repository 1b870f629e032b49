"""Which worker ids belong to which certificate.

An id that is given out under a certificate ends with a tag of the certificate's name, so that the binding survives a
restart of the coordinator without being stored, and leases held under the id cannot be taken over by another machine.
"""

from __future__ import annotations

import hashlib

from protocol.errors import Forbidden

TAG_CHARACTERS = 12


def new_worker_id(bits: int, identity: str) -> str:
    """An id of 48 random bits for the bearer of the certificate named `identity` (empty: for anyone)."""
    return f"w{bits:012x}" + (f"-{_tag(identity)}" if identity else "")


def check_owner(worker_id: str, identity: str) -> None:
    """Raise Forbidden where a certificate is presented under an id that was not given to it; an empty id is free."""
    if worker_id and identity and worker_id.partition("-")[2] != _tag(identity):
        raise Forbidden(
            f"worker id {worker_id!r} was not given to the certificate {identity!r}; start the worker again, "
            "it will be given an id of its own"
        )


def _tag(identity: str) -> str:
    return hashlib.sha256(identity.encode()).hexdigest()[:TAG_CHARACTERS]
