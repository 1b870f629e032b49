"""What a server measures, in the text format of Prometheus: times, queue, batch, load of paths, caches, memory.

Numbers of the engine are read when they are asked for; nothing is kept twice. Needs the extra `serve`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from inference.batch_engine import EngineStats

FIRST_TOKEN_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class DoorMetrics:
    """What is measured at the doors of any server, in a registry of its own. `clock` in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "dipaco_requests", "Requests by door and status.", ["door", "status"], registry=self.registry
        )

    def answered(self, door: str, status: str) -> None:
        """A request was answered: `door` is http or grpc."""
        self._requests.labels(door, status).inc()

    def page(self) -> bytes:
        """All of it as Prometheus reads it."""
        return generate_latest(self.registry)


class ServerMetrics(DoorMetrics):
    """The measurements of one server of texts."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self._prompt_tokens = Counter("dipaco_prompt_tokens", "Tokens of prompts.", registry=self.registry)
        self._path_tokens = Counter(
            "dipaco_path_tokens", "Tokens written by each path.", ["path"], registry=self.registry
        )
        self._first_token_s = Histogram(
            "dipaco_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=FIRST_TOKEN_S,
            registry=self.registry,
        )
        self._token_s = Histogram(
            "dipaco_time_per_token_seconds",
            "Between two tokens of a text.",
            buckets=_TOKEN_S,
            registry=self.registry,
        )
        self._renewals = Counter("dipaco_snapshots", "Newer snapshots that were taken up.", registry=self.registry)
        self._failed_looks = Counter(
            "dipaco_failed_looks", "Looks for a newer snapshot that failed.", registry=self.registry
        )
        self._renewed_s = self._looked_s = clock()
        Gauge(
            "dipaco_snapshot_age_seconds", "Since the served snapshot was taken up.", registry=self.registry
        ).set_function(lambda: self.clock() - self._renewed_s)
        Gauge(
            "dipaco_look_age_seconds",
            "Since the newest look for a newer snapshot that went well.",
            registry=self.registry,
        ).set_function(lambda: self.clock() - self._looked_s)

    def follow(self, stats: Callable[[], EngineStats], open_requests: Callable[[], int]) -> None:
        """Read the engine's numbers whenever the metrics are asked for."""
        self.registry.register(_EngineNumbers(stats, open_requests))  # type: ignore[arg-type, unused-ignore]

    def asked(self, prompt_tokens: int) -> None:
        self._prompt_tokens.inc(prompt_tokens)

    def token(self, path: str, first: bool, seconds: float) -> None:
        """A token came, `seconds` after the arrival of the request (the first) or after the token before."""
        self._path_tokens.labels(path).inc()
        (self._first_token_s if first else self._token_s).observe(seconds)

    def renewed(self) -> None:
        """A newer snapshot was taken up."""
        self._renewals.inc()
        self._renewed_s = self.clock()

    def looked(self, failed: bool) -> None:
        """It was looked for a newer snapshot."""
        if failed:
            self._failed_looks.inc()
        else:
            self._looked_s = self.clock()


class _EngineNumbers:
    """A collector of what the engine and the process tell of themselves."""

    def __init__(self, stats: Callable[[], EngineStats], open_requests: Callable[[], int]) -> None:
        self._stats, self._open_requests = stats, open_requests

    def describe(self) -> list[Metric]:
        """Nothing: what it collects has names of its own."""
        return []

    def collect(self) -> Iterator[Metric]:
        found = self._stats()
        yield GaugeMetricFamily("dipaco_open_requests", "Requests being answered.", self._open_requests())
        yield GaugeMetricFamily("dipaco_running_generations", "Generations with a place.", found.running)
        yield GaugeMetricFamily("dipaco_waiting_generations", "Generations in the queue.", found.waiting)
        yield GaugeMetricFamily("dipaco_batch_rows", "Rows of the newest step.", found.rows)
        yield CounterMetricFamily("dipaco_generated_tokens", "Tokens that the engine made.", found.tokens)
        yield CounterMetricFamily("dipaco_path_switches", "Times a text went on under another path.", found.switches)
        yield CounterMetricFamily(
            "dipaco_reprefilled_tokens", "Tokens run again because of a switch.", found.reprefilled_tokens
        )
        yield CounterMetricFamily("dipaco_module_reads", "Modules read from the store.", found.cache_reads)
        yield CounterMetricFamily("dipaco_module_hits", "Modules found in memory.", found.cache_hits)
        yield GaugeMetricFamily("dipaco_module_bytes", "Bytes of modules in memory.", found.cache_bytes)
        yield GaugeMetricFamily("dipaco_slot_bytes", "Bytes of cached keys, values and states.", found.slot_bytes)
        yield GaugeMetricFamily("dipaco_snapshots_in_use", "Snapshots that texts are written by.", found.snapshots)
        yield GaugeMetricFamily("dipaco_engine_broken", "1 where the engine failed for good.", int(found.broken))
        yield GaugeMetricFamily("dipaco_resident_bytes", "Memory of the process.", psutil.Process().memory_info().rss)
