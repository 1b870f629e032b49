"""The one small file that a worker needs besides an address: the run's token and its CA, as JSON."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class BadJoinFile(ValueError):
    """A join file that is missing or is not one."""


class JoinFile(BaseModel):
    """`token` admits to the run, `ca_pem` proves its coordinator, `address` (HOST:PORT) says where it is, if known."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    token: str = Field(min_length=16, pattern=r"^[A-Za-z0-9_\-]+$", repr=False)
    ca_pem: str = Field(pattern=r"^-----BEGIN CERTIFICATE-----")
    address: str | None = None

    @classmethod
    def read(cls, path: Path) -> JoinFile:
        """The join file at `path`; raises BadJoinFile."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise BadJoinFile(f"join file {path} cannot be read: {error.strerror}") from None
        except ValidationError as error:
            where = ".".join(str(part) for part in error.errors()[0]["loc"]) or "the file"
            raise BadJoinFile(
                f"{path} is not a join file ({where}: {error.errors()[0]['msg']}); `dipaco certs RUN` writes one"
            ) from None

    def to_json(self) -> str:
        """The file's text."""
        return self.model_dump_json(indent=2) + "\n"
