"""Stands in for the `dipaco` command: writes what a cell's steps would, and behaves as files in the data folder ask.

`calls.jsonl` collects the words of every call. `fail` with a word in it: a call with that word ends with 1. `hold`: a
run waits until it is gone or SIGINT comes, then ends with 3, as a stopped run does; with "SIGTERM" in it only that ends
it, with "nothing" no signal does. `pause/CELL.db`: the run in the folder of that name leaves this state, and ends as
one that pauses does. `garble`: an evaluation writes no JSON. A cloze is answered by accuracies made up by route.
"""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import sys
import time
from pathlib import Path


def main(words: list[str]) -> int:
    with open("calls.jsonl", "a", encoding="utf-8") as calls:
        calls.write(json.dumps(words) + "\n")
    failing = Path("fail")
    if failing.is_file() and any(failing.read_text(encoding="utf-8") in word for word in words):
        print("dipaco: something is wrong here", file=sys.stderr)
        return 1
    return {"run": _run, "evaluate": _evaluate, "cloze": _cloze}[words[0]](words)


def _run(words: list[str]) -> int:
    stopped: list[int] = []
    asked = Path("hold").read_text(encoding="utf-8") if Path("hold").exists() else ""
    deaf_to = {"": (), "SIGTERM": (signal.SIGINT,), "nothing": (signal.SIGINT, signal.SIGTERM)}[asked]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN if number in deaf_to else lambda number, frame: stopped.append(number))
    run_dir = Path(words[words.index("--run-dir") + 1])
    (run_dir / "workers").mkdir(parents=True, exist_ok=True)
    with open(run_dir / "started", "a", encoding="utf-8") as started:
        started.write("x")
    left = Path("pause") / f"{run_dir.parent.name}.db"
    if left.is_file():
        shutil.copy(left, run_dir / "state.db")
        print("dipaco: the coordinator ended with code 1", file=sys.stderr)
        return 1
    while Path("hold").exists():
        if stopped:
            return 3
        time.sleep(0.01)
    return 0


def _evaluate(words: list[str]) -> int:
    """Perplexities that follow from the configuration and the split alone."""
    if Path("garble").exists():
        print("{'perplexity': ")
        return 0
    run_dir = Path(words[1])
    config = (run_dir.parent / "config.yaml").read_text(encoding="utf-8")
    split = words[words.index("--split") + 1]
    value = 1000 * _number(config, "    learning_rate") + _number(config, "  seed") + (split == "test")
    value += 5 * ("kind: product-kmeans" in config) + 20 * ("kind: all" in config)
    routes = [word for before, word in itertools.pairwise(words) if before == "--route"]
    found = {route: value + index / 10 for index, route in enumerate(routes)} | {"sequence": value}
    document = {
        "split": split,
        "perplexity": {"dipaco": found},
        "bits_per_byte": {"dipaco": found},
        "path_load": {},
    }
    print(json.dumps(document))
    return 0


def _cloze(words: list[str]) -> int:
    routes = [word for before, word in itertools.pairwise(words) if before == "--route"]
    values = {"base": 0.3, "dipaco": {route: 0.5 + index / 100 for index, route in enumerate(routes)}}
    keys = ("accuracy", "standard_error", "gain_accuracy", "gain_standard_error")
    document = {**dict.fromkeys(keys, values), "items_digest": "e" * 64}
    print(json.dumps({**document, "per_domain": {"law": {"items": 3, **dict.fromkeys(keys, values)}}}))
    return 0


def _number(config: str, key: str) -> float:
    """The first value of a key that stands so far to the right."""
    return float(next(line for line in config.splitlines() if line.startswith(f"{key}: ")).partition(": ")[2])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
