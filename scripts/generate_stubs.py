"""Writes the committed stubs of the .proto files in protocol/: python scripts/generate_stubs.py [--check].

`--check` writes nothing and fails where the committed stubs are not theirs. Needs grpcio-tools of the
version that made the stubs; their headers name it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ("dipaco", "inference")
STUBS = tuple(f"{name}{end}" for name in PROTOS for end in ("_pb2.py", "_pb2_grpc.py", "_pb2.pyi"))


def generate(out: Path) -> dict[str, bytes]:
    """Run protoc into the directory `out`; returns the stubs by file name. Raises RuntimeError where protoc refuses."""
    flags = [f"--{kind}_out={out}" for kind in ("python", "grpc_python", "pyi")]
    well_known = files("grpc_tools") / "_proto"
    for proto in PROTOS:
        if protoc.main(["protoc", f"-I{ROOT}", f"-I{well_known}", *flags, f"protocol/{proto}.proto"]):
            raise RuntimeError(f"protoc refuses protocol/{proto}.proto; its message stands above")
    return {name: (out / "protocol" / name).read_bytes() for name in STUBS}


def drifted(stubs: dict[str, bytes]) -> list[str]:
    """The names of the committed stubs that differ from `stubs`."""
    paths = {name: ROOT / "protocol" / name for name in STUBS}
    return [name for name, path in paths.items() if not path.is_file() or path.read_bytes() != stubs[name]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 where a stub has drifted")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as out:
        stubs = generate(Path(out))
    names = drifted(stubs)
    if check:
        for name in names:
            print(f"protocol/{name} is not the stub of its .proto; run python scripts/generate_stubs.py")
        return 1 if names else 0
    for name in names:
        (ROOT / "protocol" / name).write_bytes(stubs[name])
        print(f"wrote protocol/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
