"""What a gateway measures: who answered, who failed, how soon a backend began, and which are up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric

from inference.metrics import FIRST_TOKEN_S, DoorMetrics


class GatewayMetrics(DoorMetrics):
    """The measurements of one gateway."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self._answers = Counter(
            "dipaco_path_requests", "Requests that each path's backend answered.", ["path"], registry=self.registry
        )
        self._failovers = Counter(
            "dipaco_failovers",
            "Requests that another path answered than the router's first choice, by that choice.",
            ["path"],
            registry=self.registry,
        )
        self._failures = Counter(
            "dipaco_backend_failures", "Failed requests to backends.", ["path", "kind"], registry=self.registry
        )
        self._first_byte_s = Histogram(
            "dipaco_backend_first_byte_seconds",
            "From a request to a backend to the first of its stream, or to its whole answer.",
            ["path", "stream"],
            buckets=FIRST_TOKEN_S,
            registry=self.registry,
        )

    def follow(self, up: Callable[[], Mapping[str, bool]], open_requests: Callable[[], int]) -> None:
        """Read which backends are up, by path, whenever the metrics are asked for."""
        self.registry.register(_Standing(up, open_requests))  # type: ignore[arg-type, unused-ignore]

    def forwarded(self, path: str, first_choice: str, stream: bool, seconds: float) -> None:
        """A path's backend began to answer after so long."""
        self._answers.labels(path).inc()
        self._first_byte_s.labels(path, str(stream).lower()).observe(seconds)
        if path != first_choice:
            self._failovers.labels(first_choice).inc()

    def failed(self, path: str, kind: str) -> None:
        """A backend failed a request."""
        self._failures.labels(path, kind).inc()


class _Standing:
    """A collector of what is read when it is asked for."""

    def __init__(self, up: Callable[[], Mapping[str, bool]], open_requests: Callable[[], int]) -> None:
        self._up, self._open_requests = up, open_requests

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("dipaco_backend_up", "Whether the path's backend is asked.", labels=["path"])
        for path, is_up in self._up().items():
            up.add_metric([path], float(is_up))
        yield up
        yield GaugeMetricFamily("dipaco_open_requests", "Requests that are being answered.", self._open_requests())
