"""What a server says of itself to Prometheus, at `GET /metrics`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from listener_reward.errors import missing
from listener_reward.verdict import Verdict

if fault := missing("serve", "a server"):
    raise fault

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

PREFIX = "listener_reward"

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
PAIRS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MASS = (0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 1)


class Metrics:
    """The metrics of one server. `judged` is the `observe` of its `BatchingJudge`."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            f"{PREFIX}_requests", "Requests by route and status.", ["route", "status"], registry=self.registry
        )
        self.request_seconds = Histogram(
            f"{PREFIX}_request_seconds",
            "From the arrival of a request that was scored to its answer.",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.batch_pairs = Histogram(
            f"{PREFIX}_batch_pairs", "Pairs of one call of the judge.", buckets=PAIRS, registry=self.registry
        )
        self.batch_seconds = Histogram(
            f"{PREFIX}_batch_seconds", "Seconds of one call of the judge.", buckets=SECONDS, registry=self.registry
        )
        self.comparisons = self._counter("comparisons", "Pairs with a verdict.")
        self.failures = self._counter("failures", "Calls of the judge that gave no verdicts; halves count again.")
        self.listened = self._counter("listened", "Verdicts that a listener has checked.")
        self.contradictions = self._counter("contradictions", "Verdicts that the listener contradicts.")
        self.thoughts = self._counter("thoughts", "Thoughts, well-formed or not.")
        self.malformed = self._counter("malformed_thoughts", "Thoughts that were malformed.")
        self.label_mass = Histogram(
            f"{PREFIX}_label_mass",
            "Probability of the two labels at the answer slot; near 0 the judge answers in another format.",
            buckets=MASS,
            registry=self.registry,
        )

    def _counter(self, name: str, what: str) -> Counter:
        return Counter(f"{PREFIX}_{name}", what, registry=self.registry)

    def gauge(self, name: str, what: str, value: Callable[[], float]) -> None:
        """A number that is asked for when somebody reads the metrics."""
        Gauge(f"{PREFIX}_{name}", what, registry=self.registry).set_function(value)

    def judged(self, pairs: int, seconds: float, verdicts: Sequence[Verdict] | None) -> None:
        """One call of the judge; see `batching.Observer`."""
        self.batch_pairs.observe(pairs)
        self.batch_seconds.observe(seconds)
        if verdicts is None:
            self.failures.inc()
            return
        self.comparisons.inc(pairs)
        for verdict in verdicts:
            self.listened.inc(verdict.contradicted is not None)
            self.contradictions.inc(verdict.contradicted is True)
            self.thoughts.inc(len(verdict.thoughts))
            self.malformed.inc(verdict.malformed)
            if verdict.label_mass is not None:
                self.label_mass.observe(verdict.label_mass)

    def page(self) -> bytes:
        return generate_latest(self.registry)
