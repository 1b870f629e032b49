"""Attacks a coordinator in which an honest worker carries out a small run, and watches both.

Seeded cases over every call of the .proto, the tensor stream and raw sockets. Each answer must be a clear status within
a deadline, the log free of tracebacks, the run's `digest --all` that of the undisturbed run, and memory flat. Exit code
1 on any finding; `--seed K --case N` repeats one case.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts import fuzz_calls, fuzz_sockets, fuzz_uploads  # noqa: E402
from scripts.fuzz_peer import Finding, Peer, Strangers  # noqa: E402
from scripts.fuzz_target import Target, TargetFailed, undisturbed_digest  # noqa: E402

CASES = (*fuzz_calls.CASES, *fuzz_uploads.CASES, *fuzz_sockets.CASES)
PEERS = 2
LOOK_S = 0.5
TELL_S = 30.0
MOST_FINDINGS = 20
MOST_CASES = 1 << 62
# Flat: the last half of the cases makes the coordinator larger by less than this a thousand cases. Judged from so many
# cases on, since a process fills its pools first.
GROWTH_BYTES, JUDGED_FROM = 1_000_000, 10_000
# The honest run is as long as the attack: a phase for so many cases, or seconds.
CASES_A_PHASE, SECONDS_A_PHASE = 60, 6.0


@dataclass(frozen=True, slots=True)
class Wish:
    """How much to attack: so many cases, or for so many minutes."""

    seed: int
    cases: int
    minutes: float
    first_case: int = 0

    @property
    def phases(self) -> int:
        by_time, by_cases = self.minutes * 60 / SECONDS_A_PHASE, self.cases / CASES_A_PHASE
        return max(2, round(by_time if self.minutes else by_cases))


def carry_out_case(seed: int, peer: Peer, number: int) -> None:
    """One case: everything it does follows from the seed and its number. Raises Finding."""
    peer.draw = random.Random(f"{seed}/{number}")
    case = peer.draw.choice(CASES)
    try:
        case(peer)
    except Finding as finding:
        raise Finding(f"{case.__module__.rpartition('.')[2]}.{case.__name__}: {finding}") from None
    except Exception as error:  # the attack itself came across something it did not expect
        raise Finding(f"{case.__name__}: {type(error).__name__}: {error}") from error


class Attack:
    """The attack on one target, with what was measured on the way."""

    def __init__(self, wish: Wish, target: Target, say: Callable[[str], None]) -> None:
        self._wish, self._target, self._say = wish, target, say
        self._began_s = time.monotonic()
        self.seconds = 0.0
        self.memory: list[tuple[int, int, int]] = []  # cases, resident bytes, file descriptors
        self.complaints: list[str] = []
        self.strangers = Strangers(
            PEERS,
            lambda: Peer(target.address, target.run_dir),
            lambda peer, number: carry_out_case(wish.seed, peer, number),
        )

    def share(self) -> float:
        """How much of the attack is over."""
        if not self.strangers.working and self.memory:
            return 1.0
        if self._wish.minutes:
            return min(1.0, (time.monotonic() - self._began_s) / (60 * self._wish.minutes))
        return self.strangers.done / max(1, self._wish.cases)

    def run(self) -> None:
        """Until all cases are done, the time is over, or enough was found."""
        self.strangers.start(self._wish.first_case, MOST_CASES if self._wish.minutes else self._wish.cases)
        told_s = time.monotonic()
        while self.strangers.working and self._target.alive and len(self.strangers.findings) < MOST_FINDINGS:
            if self._wish.minutes and time.monotonic() - self._began_s > 60 * self._wish.minutes:
                break
            self._look()
            if time.monotonic() > told_s + TELL_S:
                told_s = time.monotonic()
                self._say(f"{self.strangers.done} cases, {self.memory[-1][1] / 1e6:.1f} MB, {self.memory[-1][2]} files")
            time.sleep(LOOK_S)
        self.strangers.stop()
        self.seconds = time.monotonic() - self._began_s
        if self._target.alive:
            self._look()

    def _look(self) -> None:
        self.memory.append((self.strangers.done, *self._target.memory()))
        if complaint := self._target.complaint():
            self.complaints.append(complaint)
            self._say(f"after {self.strangers.done} cases the log says: {complaint}")


def growth_a_thousand_cases(memory: list[tuple[int, int, int]]) -> float:
    """Slope, by least squares, of the resident bytes over the last half of the cases, for a thousand of them."""
    last = memory[-1][0]
    points = [(cases, resident) for cases, resident, _ in memory if cases >= last / 2]
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return 1000 * sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0


def fuzz(wish: Wish, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """The whole attack and what came of it; `findings` is empty where all is well."""
    reference = undisturbed_digest(folder / "undisturbed", wish.phases)
    say(f"undisturbed, {wish.phases} phases end with {reference}")
    digest, findings = "", []
    with Target(folder / "attacked", wish.phases).running() as target:
        attack = Attack(wish, target, say)
        worker = target.honest_worker(attack.share)
        attack.run()
        try:
            digest = target.digest(worker)
        except (TargetFailed, ValueError) as error:
            findings.append({"what": str(error)})
    findings += attack.strangers.findings
    findings += [{"what": complaint} for complaint in attack.complaints]
    if digest and digest != reference:
        findings.append({"what": "the run under attack ended with other bits"})
    growth = growth_a_thousand_cases(attack.memory)
    if attack.strangers.done >= JUDGED_FROM and growth >= GROWTH_BYTES:
        findings.append({"what": f"memory grows by {growth:.0f} bytes a thousand cases"})
    return {
        "seed": wish.seed,
        "cases": attack.strangers.done,
        "seconds": attack.seconds,
        "findings": [{"seed": wish.seed, **finding} for finding in findings],
        "digest": digest,
        "reference_digest": reference,
        "digest_equal": digest == reference,
        "phases": wish.phases,
        "growth_bytes_per_1000_cases": growth,
        "rss_bytes": {name: attack.memory[at][1] for name, at in _places(attack.memory)},
        "file_descriptors": {name: attack.memory[at][2] for name, at in _places(attack.memory)},
        "rss_bytes_by_cases": [
            attack.memory[at][:2] for at in range(0, len(attack.memory), len(attack.memory) // 60 + 1)
        ],
        "answers": dict(sorted(attack.strangers.answers.items())),
    }


def _places(memory: list[tuple[int, int, int]]) -> list[tuple[str, int]]:
    return [("first", 0), ("half", len(memory) // 2), ("last", -1)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--cases", type=int, default=2000, metavar="N", help="so many cases (2000)")
    parser.add_argument("--minutes", type=float, default=0.0, metavar="M", help="instead: for so many minutes")
    parser.add_argument("--seed", type=int, default=0, metavar="K", help="of all cases (0)")
    parser.add_argument("--case", type=int, metavar="N", help="only this case, to repeat a finding")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON, progress to standard error")
    arguments = parser.parse_args()
    wish = Wish(arguments.seed, arguments.cases, arguments.minutes)
    if arguments.case is not None:
        wish = Wish(arguments.seed, 1, 0.0, arguments.case)
    folder = Path(tempfile.mkdtemp(prefix="dipaco-fuzz-"))
    outcome = fuzz(wish, folder, lambda line: print(line, file=sys.stderr, flush=True))
    if outcome["findings"]:
        print(f"the runs and their logs are in {folder}", file=sys.stderr)
    else:
        shutil.rmtree(folder)
    print(json.dumps(outcome, indent=2) if arguments.json else _told(outcome))
    return 1 if outcome["findings"] else 0


def _told(outcome: dict[str, Any]) -> str:
    lines = [
        f"case {finding['case']} of seed {finding['seed']}: {finding['what']}"
        if "case" in finding
        else str(finding["what"])
        for finding in outcome["findings"]
    ]
    equal = "equal" if outcome["digest_equal"] else "NOT equal"
    return "\n".join(
        [
            *lines,
            f"{outcome['cases']} cases in {outcome['seconds']:.0f} s, {len(lines)} findings; digest {equal} to the "
            f"undisturbed run's; memory {outcome['growth_bytes_per_1000_cases'] / 1e6:+.3f} MB a thousand cases",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
