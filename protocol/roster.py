"""The client certificates that a run has issued to its workers, and which of them are revoked: RUN/certs/workers.json.

The file holds no secret. A running coordinator reads it again when it changes, so that revoking needs no restart.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class BadRoster(ValueError):
    """A roster that is none, or that has no such certificate."""


class IssuedCertificate(BaseModel):
    """One certificate: who has it, its serial number in hex, when it was issued, ends, and was revoked (UTC)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=NAME_PATTERN)
    serial: str = Field(pattern=r"^[0-9a-f]{1,40}$")
    issued: datetime.datetime
    expires: datetime.datetime
    revoked: datetime.datetime | None = None


class Roster(BaseModel):
    """All certificates of a run's workers, in the order in which they were issued."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    certificates: tuple[IssuedCertificate, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Roster:
        """The roster at `path`, empty where there is none; raises BadRoster."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return cls()
        except ValidationError as error:
            raise BadRoster(f"{path} is damaged ({error.errors()[0]['msg']}); restore it from a copy") from None

    def to_json(self) -> str:
        """The file's text."""
        return self.model_dump_json(indent=1) + "\n"

    def with_one_more(self, certificate: IssuedCertificate) -> Roster:
        return Roster(certificates=(*self.certificates, certificate))

    def with_revoked(self, name_or_serial: str, now: datetime.datetime) -> tuple[Roster, tuple[IssuedCertificate, ...]]:
        """Revoke every certificate of that name, or the one of that serial number; also returns those it revoked.

        Raises BadRoster where there is none. One that is revoked already stays as it is.
        """
        wanted = [each for each in self.certificates if name_or_serial in (each.name, each.serial)]
        if not wanted:
            known = ", ".join(dict.fromkeys(each.name for each in self.certificates)) or "none were issued"
            raise BadRoster(f"no certificate has the name or serial number {name_or_serial!r} (names: {known})")
        fresh = {each.serial: each.model_copy(update={"revoked": now}) for each in wanted if each.revoked is None}
        return Roster(certificates=tuple(fresh.get(each.serial, each) for each in self.certificates)), tuple(
            fresh.values()
        )

    def revoked(self) -> Mapping[str, datetime.datetime]:
        """When each revoked certificate was revoked, by serial number."""
        return {each.serial: each.revoked for each in self.certificates if each.revoked is not None}
