"""Asks a server of texts far more than it likes, and holds its answers against the same prompts alone.

    python scripts/soak_server.py runs/quickstart [--requests 1000] [--clients 32] [--json]

A server of the run is started in a process of its own. Its clients mix routes, seeds, streams, requests that are given
up in the middle, and requests that cannot be answered. Afterwards every whole answer is generated alone, by the plain
engine, with the same seed. It fails where a request is lost, where an answer differs before the first position at which
rounding may decide, where fewer than 95 % are equal whole, or where memory grows. Needs the extra `serve`.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from corpus.installed import EXAMPLE_PROMPTS

WRONG: list[tuple[dict[str, Any], int]] = [
    ({"model": "nobody"}, 404),
    ({"max_tokens": 0}, 400),
    ({"temperature": "hot"}, 400),
    ({"route": "best"}, 400),
    ({"unheard_of": 1}, 400),
    ({"logprobs": 3}, 400),
]
ROUTES = ("sequence", "every:8", "every:16")
PATIENCE_S = 120.0


@dataclass(frozen=True, slots=True)
class Asked:
    """One request of the soak, and what is done with it: `whole`, `stream`, `leave` or `wrong`."""

    number: int
    kind: str
    body: dict[str, Any]
    status: int = 200


@dataclass(frozen=True, slots=True)
class Got:
    """What came of it; `text` of whole answers."""

    asked: Asked
    outcome: str
    text: str | None = None


def plan(requests: int, model: str, tokens: int, seed: int) -> list[Asked]:
    """The requests of a soak, the same ones for a seed."""
    source = random.Random(seed)
    prompts = list(EXAMPLE_PROMPTS.values())
    made = []
    for number in range(requests):
        kind = source.choices(["whole", "stream", "leave", "wrong"], [45, 30, 15, 10])[0]
        prompt = source.choice(prompts)[: source.randint(4, 40)]
        body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": source.randint(4, tokens)}
        body |= {"seed": number, "temperature": source.choice([0.0, 0.7, 1.0]), "route": source.choice(ROUTES)}
        if kind == "wrong":
            change, status = source.choice(WRONG)
            made.append(Asked(number, kind, body | change, status))
        else:
            made.append(Asked(number, kind, body | {"stream": kind != "whole"}))
    return made


def ask(url: str, asked: Asked) -> Got:
    """Carry a request out; it is asked again while the queue is full."""
    began_s = time.monotonic()
    while time.monotonic() - began_s < PATIENCE_S:
        request = urllib.request.Request(f"{url}/v1/completions", json.dumps(asked.body).encode())
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
                return _read(asked, answer)
        except urllib.error.HTTPError as error:
            with error:
                error.read()
            if error.code == 429:
                time.sleep(0.05)
                continue
            return Got(asked, "refused" if error.code == asked.status else f"status {error.code}")
        except OSError as error:
            return Got(asked, f"lost: {error}")
    return Got(asked, "lost: no place in time")


def _read(asked: Asked, answer: Any) -> Got:
    if asked.kind == "whole":
        return Got(asked, "answered", json.loads(answer.read())["choices"][0]["text"])
    parts: list[str] = []
    ended = False
    for line in answer:
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            ended = True
            break
        event = json.loads(line[6:])
        if "error" in event:
            return Got(asked, f"error: {event['error']['message']}")
        parts.append(event["choices"][0]["text"])
        if asked.kind == "leave" and len(parts) == 2:
            return Got(asked, "left")
    return Got(asked, "answered" if ended else "lost: the stream ended early", "".join(parts))


class Server:
    """`dipaco serve` of a run on a free port, and its memory."""

    def __init__(self, run_dir: Path, arguments: Sequence[str]) -> None:
        command = [sys.executable, "-m", "dipaco", "serve", str(run_dir), "--http", "127.0.0.1:0", *arguments]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        told = ""
        for line in self._process.stdout:
            told += line
            if found := re.search(r"HTTP +(\S+)/v1", line):
                self.url = found[1]
                break
        else:
            raise RuntimeError(f"the server did not start: {told}")
        self._reading = threading.Thread(target=self._process.stdout.read, daemon=True)
        self._reading.start()

    def resident_bytes(self) -> int:
        return int(psutil.Process(self._process.pid).memory_info().rss)

    def metric(self, name: str) -> float:
        """One number of the metrics page."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=PATIENCE_S) as answer:
            page = answer.read().decode()
        return float(next(line for line in page.splitlines() if line.startswith(f"{name} ")).split()[1])

    def until_idle(self) -> bool:
        """Whether nothing is left in the engine, within the patience."""
        began_s = time.monotonic()
        while time.monotonic() - began_s < PATIENCE_S:
            if not self.metric("dipaco_running_generations") + self.metric("dipaco_open_requests"):
                return True
            time.sleep(0.1)
        return False

    def stop(self) -> int:
        """The exit code after SIGTERM."""
        assert self._process.stdout is not None
        self._process.send_signal(signal.SIGTERM)
        code = self._process.wait(PATIENCE_S)
        self._reading.join()
        self._process.stdout.close()
        return code


def soak(
    run_dir: Path, requests: int, clients: int, tokens: int, seed: int, arguments: Sequence[str]
) -> dict[str, Any]:
    """What the soak found, with `failures` in words."""
    from coordinator.snapshot import RunSnapshot

    name = RunSnapshot.open(run_dir).config.name
    server = Server(run_dir, arguments)
    try:
        asked = plan(requests, name, tokens, seed)
        quarter = max(1, len(asked) // 4)
        began_s = time.monotonic()
        with ThreadPoolExecutor(clients) as pool:
            got = list(pool.map(lambda each: ask(server.url, each), asked[:quarter]))
            early_bytes = server.resident_bytes()
            got += pool.map(lambda each: ask(server.url, each), asked[quarter:])
        passed_s = time.monotonic() - began_s
        idle, late_bytes = server.until_idle(), server.resident_bytes()
    finally:
        code = server.stop()
    found = {
        "requests": requests,
        "clients": clients,
        "seconds": round(passed_s, 2),
        "outcomes": dict(Counter(each.outcome for each in got)),
        "early_bytes": early_bytes,
        "late_bytes": late_bytes,
        "exit_code": code,
        **compare(run_dir, [each for each in got if each.outcome == "answered"]),
    }
    return {**found, "failures": failures(found, idle)}


def failures(found: dict[str, Any], idle: bool) -> list[str]:
    """What is wrong, in words; nothing where all is well."""
    wrong = [f"{count} requests: {what}" for what, count in found["outcomes"].items() if what not in ENDS]
    if found["different"]:
        wrong.append(f"{found['different']} answers differ where rounding cannot decide")
    if found["equal"] < 0.95 * found["compared"]:
        wrong.append(f"only {found['equal']} of {found['compared']} answers are equal whole")
    grown = found["late_bytes"] - found["early_bytes"]
    if grown > max(32 * 1024**2, 0.1 * found["early_bytes"]):
        wrong.append(f"memory has grown by {grown:,} bytes since the first quarter")
    if not idle:
        wrong.append("places were not free again")
    if found["exit_code"]:
        wrong.append(f"the server ended with code {found['exit_code']}")
    return wrong


ENDS = ("answered", "left", "refused")


def compare(run_dir: Path, got: Sequence[Got]) -> dict[str, int]:
    """Answers against the same prompt alone: how many are equal whole, excused by a near-tie, or different."""
    from coordinator.snapshot import RunSnapshot
    from dipaco.examples import Desk, Wish
    from inference.sampling import Sampling
    from scripts.near_ties import excused

    snapshot = RunSnapshot.open(run_dir)
    counts: Counter[str] = Counter()
    sampling = Sampling(1.0)
    desk = Desk.open(snapshot, Wish(1, sampling))
    for each in got:
        body = each.asked.body
        sampling = Sampling(body["temperature"], seed=body["seed"])
        wish = Wish(body["max_tokens"], sampling).routed(body["route"])
        writing = desk.write(body["prompt"], wish)
        for _ in writing:
            pass
        if writing.text == each.text:
            counts["equal"] += 1
        else:
            counts["excused" if excused(desk, body["prompt"], wish, each.text or "") else "different"] += 1
    return {
        "compared": len(got),
        "equal": counts["equal"],
        "excused": counts["excused"],
        "different": counts["different"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found = soak(given.run, given.requests, given.clients, given.tokens, given.seed, ["--max-waiting", "64"])
    if given.json:
        print(json.dumps(found))
    else:
        for key, value in found.items():
            print(f"{key:<12} {value}")
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
