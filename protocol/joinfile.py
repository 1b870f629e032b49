"""The one small file that a worker needs besides an address, as JSON: the run's token and its CA.

A file for one machine also holds a client certificate of its own and its key.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class BadJoinFile(ValueError):
    """A join file that is missing or is not one."""


class JoinFile(BaseModel):
    """`token` admits to the run, `ca_pem` proves its coordinator, `address` (HOST:PORT) says where it is, if known.

    `certificate_pem` and `key_pem` prove the worker: both or none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    token: str = Field(min_length=16, pattern=r"^[A-Za-z0-9_\-]+$", repr=False)
    ca_pem: str = Field(pattern=r"^-----BEGIN CERTIFICATE-----")
    address: str | None = None
    certificate_pem: str | None = Field(default=None, pattern=r"^-----BEGIN CERTIFICATE-----")
    key_pem: str | None = Field(default=None, pattern=r"^-----BEGIN PRIVATE KEY-----", repr=False)

    @model_validator(mode="after")
    def _certificate_with_key(self) -> JoinFile:
        if (self.certificate_pem is None) != (self.key_pem is None):
            raise ValueError("certificate_pem and key_pem belong together")
        return self

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
        """The file's text; without the keys of a certificate where there is none, so that older versions read it."""
        absent = {"certificate_pem", "key_pem"} if self.certificate_pem is None else None
        return self.model_dump_json(indent=2, exclude=absent) + "\n"
