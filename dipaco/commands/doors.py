"""Options of the commands that open doors to clients, and the doors that they ask for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from inference.server import Doors

HttpAddress = Annotated[str, typer.Option(help="HOST:PORT of the HTTP server; port 0 takes a free one.")]
ModelName = Annotated[str | None, typer.Option(help="The model's name; by default the run's.")]
ApiKeyFile = Annotated[
    Path | None, typer.Option(help="File with the API keys that are admitted, one a line; followed as it changes.")
]
TlsCert = Annotated[Path | None, typer.Option(help="PEM file of a certificate with its chain, for TLS.")]
TlsKey = Annotated[Path | None, typer.Option(help="PEM file of its key.")]
OpenToAll = Annotated[
    bool, typer.Option("--insecure", help="No API key, even off loopback: anyone who can connect is answered.")
]
MaxTokens = Annotated[
    int | None, typer.Option(min=1, help="Tokens that a request may ask for at most; one sequence by default.")
]
DrainSeconds = Annotated[
    float | None, typer.Option(min=0.0, help="Seconds that open answers get at the end; all they need by default.")
]
_EXTRA = ("starlette", "uvicorn", "prometheus_client", "httpx2")


@contextmanager
def serving_imports() -> Iterator[None]:
    """Imports that need the extra `serve`; raises Refused where it is not installed."""
    from dipaco.ending import Refused

    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        raise Refused(
            f"{error.name} is not installed; install dipaco with its extra: pip install 'dipaco[serve]'"
        ) from None


def doors_of(
    http: str, api_key_file: Path | None, tls_cert: Path | None, tls_key: Path | None, insecure: bool, grpc: str | None
) -> Doors:
    """The doors; raises Refused, BadKeyFile."""
    from dipaco.ending import Refused

    if (tls_cert is None) != (tls_key is None):
        raise Refused("--tls-cert and --tls-key belong together; give both")
    with serving_imports():
        from inference.api_keys import ApiKeys
        from inference.server import Doors, Tls
    return Doors(
        http=http,
        grpc=grpc,
        keys=None if api_key_file is None else ApiKeys(api_key_file),
        tls=None if tls_cert is None or tls_key is None else Tls(tls_cert, tls_key),
        insecure=insecure,
    )


def say(line: str) -> None:
    """A log that cannot be written ends no server."""
    with suppress(OSError):
        print(line, flush=True)
