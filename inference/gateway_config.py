"""Where the paths of a gateway are served: the YAML file and the flags, checked against the paths of its router.

API keys come from files or environment variables; none stands in the YAML file, in a URL or on a command line.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field, ValidationError

from configs.complaint import complaint
from configs.load import UniqueKeyLoader, mapping_in, text_of
from configs.section import Section

Seconds = Annotated[float, Field(gt=0, le=86_400)]


class BadBackend(ValueError):
    """A backend that cannot be: no such path, no URL, no key where one was promised."""


class _TextLoader(UniqueKeyLoader):
    """YAML whose scalars are all text, so that the path 0.10 does not become the number 0.1."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (the name and the kind are the library's)


class BackendConfig(Section):
    """Who serves one path: the base URL of its OpenAI API (as a client has it), and the model's name there.

    `ca_file`: PEM file of the certificates that its TLS is checked with, instead of the machine's.
    """

    url: str
    model: Annotated[str, Field(min_length=1)]
    api_key_file: Path | None = None
    api_key_env: Annotated[str, Field(min_length=1)] | None = None
    ca_file: Path | None = None


class Patience(Section):
    """How long the gateway waits for a backend, and lets one rest that failed."""

    connect_s: Seconds = 5.0
    """Until a backend takes the connection."""
    first_byte_s: Seconds = 60.0
    """Until the first event of a stream; then another path is asked."""
    silence_s: Seconds = 600.0
    """Between two events of a stream, and for an answer that is not streamed as a whole."""
    probe_s: Seconds = 5.0
    """Between two looks at every backend's /models."""
    cool_down_s: Seconds = 5.0
    """Rest after a failed request, doubled with every one that follows at once, at most a minute."""


class _File(Patience):
    backends: dict[str, BackendConfig] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Target:
    """One checked backend; `tls` None where the machine's own certificates are asked or the URL has no TLS."""

    path: str
    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    tls: ssl.SSLContext | None = None


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """Backends by path id."""

    backends: Mapping[str, BackendConfig]
    patience: Patience


def read_config(file: Path | None, flags: Sequence[str] = ()) -> GatewayConfig:
    """The file's backends and those of flags (PATH=MODEL@URL); raises InvalidConfig and BadBackend.

    Files that the YAML file names are found from its folder.
    """
    read = _File() if file is None else _parsed(text_of(file), str(file))
    folder = Path() if file is None else file.parent
    backends = {path: _from(folder, backend) for path, backend in read.backends.items()}
    for flag in flags:
        path, backend = flag_backend(flag)
        if path in backends:
            raise BadBackend(f"path {path} has two backends, the second by --backend {flag}; give it one")
        backends[path] = backend
    if not backends:
        raise BadBackend("no path has a backend; name them in a file (--config) or by --backend PATH=MODEL@URL")
    patience = Patience(**{name: getattr(read, name) for name in Patience.model_fields})
    return GatewayConfig(backends, patience)


def flag_backend(flag: str) -> tuple[str, BackendConfig]:
    """The path and its backend in `PATH=MODEL@URL`; raises BadBackend."""
    path, _, rest = flag.partition("=")
    starts = [at for scheme in ("@http://", "@https://") if (at := rest.find(scheme)) > 0]
    if not path or not starts:
        raise BadBackend(f"--backend {flag!r} is not PATH=MODEL@URL, like 0.1=my-model@http://127.0.0.1:8001/v1")
    return path, BackendConfig(url=rest[min(starts) + 1 :], model=rest[: min(starts)])


def targets(
    config: GatewayConfig, paths: Sequence[str], environment: Mapping[str, str], *, partial: bool = False
) -> tuple[Target | None, ...]:
    """The backend of every path of the router, in its order; None, with `partial` only, where a path has none.

    Raises BadBackend.
    """
    unknown = [path for path in config.backends if path not in paths]
    if unknown:
        raise BadBackend(f"backend {unknown[0]!r} is of no path of the router, which has {', '.join(paths)}")
    without = [path for path in paths if path not in config.backends]
    if without and not partial:
        raise BadBackend(
            f"path {without[0]} has no backend ({len(without)} of {len(paths)} have none); name one, or pass --partial "
            "to send its texts to the next best path"
        )
    return tuple(
        _target(path, config.backends[path], environment) if path in config.backends else None for path in paths
    )


def _parsed(text: str, source: str) -> _File:
    from configs.load import InvalidConfig

    data = mapping_in(text, source, "backends", _TextLoader)
    try:
        return _File.model_validate(data)
    except ValidationError as error:
        raise InvalidConfig(f"{source}: {complaint(error.errors(), data, _File)}") from None


def _from(folder: Path, backend: BackendConfig) -> BackendConfig:
    files = {name: getattr(backend, name) for name in ("api_key_file", "ca_file")}
    return backend.model_copy(update={name: folder / file for name, file in files.items() if file is not None})


def _target(path: str, backend: BackendConfig, environment: Mapping[str, str]) -> Target:
    _check_url(path, backend.url)
    key = _key(path, backend, environment)
    return Target(path, backend.url.rstrip("/"), backend.model, key, _tls(path, backend))


def _check_url(path: str, url: str) -> None:
    wrong = f"the backend of path {path}: url {url!r}"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise BadBackend(f"{wrong} is none: {error}") from None
    if parts.username is not None or parts.password is not None:
        raise BadBackend(
            f"the backend of path {path}: its url holds a user or password; keys go into api_key_file or api_key_env"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise BadBackend(f"{wrong} is none of an HTTP server, expected one like http://127.0.0.1:8001/v1")
    if parts.query or parts.fragment or any(letter.isspace() or not letter.isprintable() for letter in url):
        raise BadBackend(f"{wrong} has more than scheme, host, port and folder, expected one like http://HOST:8001/v1")


def _key(path: str, backend: BackendConfig, environment: Mapping[str, str]) -> str | None:
    file, name = backend.api_key_file, backend.api_key_env
    if file is not None and name is not None:
        raise BadBackend(f"the backend of path {path} has api_key_file and api_key_env; give one of them")
    if name is not None:
        key, place = environment.get(name, ""), f"the environment variable {name}"
    elif file is not None:
        try:
            key, place = file.read_text(encoding="utf-8"), str(file)
        except (OSError, UnicodeDecodeError) as error:
            raise BadBackend(f"the backend of path {path}: api_key_file {file} cannot be read: {error}") from None
    else:
        return None
    key = key.strip()
    if not key:
        raise BadBackend(f"the backend of path {path}: {place} holds no API key; put it there or leave it out")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise BadBackend(f"the backend of path {path}: {place} holds more than one API key, expected one line of ASCII")
    return key


def _tls(path: str, backend: BackendConfig) -> ssl.SSLContext | None:
    if backend.ca_file is None:
        return None
    if not backend.url.startswith("https:"):
        raise BadBackend(f"the backend of path {path} has a ca_file and no TLS; write its url with https")
    try:
        return ssl.create_default_context(cafile=str(backend.ca_file))
    except (OSError, ssl.SSLError) as error:
        raise BadBackend(
            f"the backend of path {path}: ca_file {backend.ca_file} holds no certificates in PEM: {error}"
        ) from None
