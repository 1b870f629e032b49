"""What a bad network does to the links of a simulation: delay, jitter, rate, loss, resets and partitions. Pure, seeded.

Words and meanings follow tc-netem: `latency` and `jitter` are added one way, in both directions alike. A relay carries
a TCP stream and loses no byte: loss is modelled as what it costs one, a stall until the lost packets of a piece were
sent again. That is no packet loss: congestion control, reordering and duplicates do not occur.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from dipaco.faults import HORIZON_S, Fault, MalformedPlan, worker_name

PACKET_BYTES = 1460
# What TCP waits at the least before it sends a packet again (Linux); the wait doubles each time it is lost again.
RETRANSMISSION_S = 0.2
MOST_RETRANSMISSIONS = 6
PARTITION_S = 30.0

_SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6}
_BITS = {"": 1.0, "bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_SHARE = {"": 1.0, "%": 0.01}
# Option, field, units, whether zero means something, and what a person is told to write.
_OPTIONS = {
    "latency": ("latency_s", _SECONDS, True, "seconds, such as 0.2 or 200ms"),
    "jitter": ("jitter_s", _SECONDS, True, "seconds, such as 0.05 or 50ms"),
    "rate": ("rate_bits_per_s", _BITS, False, "bits a second, such as 10Mbit or 500kbit"),
    "loss": ("loss", _SHARE, True, "a share of the packets below 1, such as 0.05 or 5%"),
    "drop_mtbf": ("drop_mtbf_s", _SECONDS, False, "seconds above 0"),
    "partition_mtbf": ("partition_mtbf_s", _SECONDS, False, "seconds above 0"),
    "partition": ("partition_s", _SECONDS, False, "seconds above 0"),
}


class MalformedNetwork(ValueError):
    """A network specification that says nothing clear."""


@dataclass(frozen=True, slots=True)
class Network:
    """What every worker's link to the coordinator is like.

    `latency_s` and `jitter_s` (uniform, plus or minus) one way, `rate_bits_per_s` each way, `loss` of each packet. The
    link's connections are reset after exponential times of mean `drop_mtbf_s`; after such times of mean
    `partition_mtbf_s` nothing passes for `partition_s`, and nobody is told.
    """

    latency_s: float = 0.0
    jitter_s: float = 0.0
    rate_bits_per_s: float | None = None
    loss: float = 0.0
    drop_mtbf_s: float | None = None
    partition_mtbf_s: float | None = None
    partition_s: float = PARTITION_S

    @property
    def spec(self) -> str:
        """The specification that `parse_network` reads as this network."""
        values = {option: getattr(self, name) for option, (name, *_) in _OPTIONS.items()}
        if self.partition_mtbf_s is None:
            del values["partition"]
        return ",".join(f"{option}={value:.12g}" for option, value in values.items() if value)

    def faults(self, num_workers: int, seed: int) -> list[Fault]:
        """Resets (`drop`) and partitions (`part`, `heal`) of the workers' links, each from a source of its own."""
        found: list[Fault] = []
        for worker_index in range(num_workers):
            name = worker_name(worker_index)
            if self.drop_mtbf_s is not None:
                source = random.Random(f"{seed}/drop/{worker_index}")
                found += [Fault(at_s, name, "drop") for at_s in _moments(source, self.drop_mtbf_s, 0.0)]
            if self.partition_mtbf_s is not None:
                source = random.Random(f"{seed}/partition/{worker_index}")
                for at_s in _moments(source, self.partition_mtbf_s, self.partition_s):
                    found += [Fault(at_s, name, "part"), Fault(at_s + self.partition_s, name, "heal")]
        return sorted(found)


@dataclass(frozen=True, slots=True)
class Conditions:
    """A network and the seed of its chances: the first line of a plan, where the plan has a network."""

    network: Network
    seed: int

    def line(self) -> str:
        return json.dumps({"network": self.network.spec, "seed": self.seed}) + "\n"


def split_plan(text: str) -> tuple[Conditions | None, str]:
    """The conditions of a plan, if its first line names any, and its faults; raises MalformedPlan."""
    first, _, rest = text.partition("\n")
    try:
        named = json.loads(first)
    except ValueError:
        return None, text
    if not isinstance(named, dict) or "network" not in named:
        return None, text
    try:
        spec, seed = str(named["network"]), int(named["seed"])
        return Conditions(parse_network(spec) if spec else Network(), seed), rest
    except (KeyError, TypeError, ValueError) as error:
        raise MalformedPlan(
            f'line 1 of the plan is {first!r}; expected {{"network": "latency=0.2", "seed": 0}} ({error})'
        ) from None


def _moments(source: random.Random, mean_s: float, away_s: float) -> Iterator[float]:
    """Times with exponential gaps, and `away_s` after each of them."""
    at_s = 0.0
    while (at_s := at_s + source.expovariate(1 / mean_s)) < HORIZON_S:
        yield at_s
        at_s += away_s


def parse_network(text: str) -> Network:
    """From `latency=200ms,jitter=50ms,rate=10Mbit,loss=5%,drop_mtbf=30,partition_mtbf=120,partition=60`, each optional.

    Raises MalformedNetwork.
    """
    given: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        option, _, value = part.partition("=")
        if option not in _OPTIONS:
            raise MalformedNetwork(f"--network has no option {option!r}; there are {', '.join(_OPTIONS)}")
        name, units, may_be_zero, expected = _OPTIONS[option]
        number = _number(value, units)
        if number is None or number < 0 or (number == 0 and not may_be_zero) or (name == "loss" and number >= 1):
            raise MalformedNetwork(f"--network: {option} is {value!r}, expected {expected}")
        given[name] = number
    if not given:
        raise MalformedNetwork(f"--network is {text!r}; expected something like latency=200ms,rate=10Mbit,loss=5%")
    network = Network(**given)
    if network.jitter_s > network.latency_s:
        raise MalformedNetwork("--network: jitter is plus or minus and cannot be more than latency")
    if "partition_s" in given and network.partition_mtbf_s is None:
        raise MalformedNetwork(
            "--network: partition= says how long one lasts; partition_mtbf= says how often they come"
        )
    return network


def _number(text: str, units: dict[str, float]) -> float | None:
    found = re.fullmatch(r"([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-z%]*)", text.strip().lower())
    if found is None or found[2] not in units:
        return None
    try:
        number = float(found[1]) * units[found[2]]
    except ValueError:
        return None
    return number if math.isfinite(number) else None


class Line:
    """One direction of one link: when the pieces that are put in come out. Pieces of a stream keep their order."""

    def __init__(self, network: Network, source: random.Random) -> None:
        self._network, self._source = network, source
        self._free_s = 0.0
        self.stalls = 0
        self.stalled_bytes = 0

    def arrival_s(self, size: int, now_s: float, after_s: float = 0.0) -> float:
        """When a piece of so many bytes comes out that is put in now; not before `after_s`, its predecessor's time.

        The line sends one piece after the other at its rate, then the latency passes. Where packets of the piece are
        lost, all that follow in the stream wait until they were sent again.
        """
        network = self._network
        begin_s = max(now_s, self._free_s)
        self._free_s = begin_s + (8 * size / network.rate_bits_per_s if network.rate_bits_per_s else 0.0)
        delay_s = network.latency_s
        if network.jitter_s:
            delay_s += self._source.uniform(-network.jitter_s, network.jitter_s)
        if stall_s := self._stall_s(size):
            self.stalls += 1
            self.stalled_bytes += size
        return max(self._free_s + delay_s + stall_s, after_s)

    def _stall_s(self, size: int) -> float:
        """A retransmission time-out plus a round trip for the packets lost, twice that where one is lost again, ..."""
        loss, packets = self._network.loss, -(-size // PACKET_BYTES)
        stall_s, wait_s = 0.0, RETRANSMISSION_S + 2 * self._network.latency_s
        for _ in range(MOST_RETRANSMISSIONS):
            if not loss or self._source.random() >= 1 - (1 - loss) ** packets:
                break
            stall_s, wait_s, packets = stall_s + wait_s, 2 * wait_s, 1
        return stall_s
