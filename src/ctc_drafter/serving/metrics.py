"""What `/metrics` tells, in the format of Prometheus."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..bench.measure import tau_of
from ..steps import Step
from .answers import Reply, Said
from .scheduler import Scheduler

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_LENGTHS = tuple(range(17))
_PER_TOKEN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.registry = registry = CollectorRegistry()
        kind = ["drafter"]

        def counter(name: str, help: str, labels: list[str]) -> Counter:
            return Counter(f"ctc_drafter_{name}", help, labels, registry=registry)

        def histogram(name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"ctc_drafter_{name}_seconds", help, kind, buckets=buckets, registry=registry)

        def gauge(name: str, help: str, value: Any) -> None:
            Gauge(f"ctc_drafter_{name}", help, registry=registry).set_function(value)

        self.requests = counter("requests", "HTTP requests.", ["path", "status"])
        self._prompt = counter("prompt_tokens", "Tokens of prompts.", kind)
        self._tokens = counter("completion_tokens", "Tokens of answers.", kind)
        self._steps = counter("steps", "Verification steps.", kind)
        self._drafted = counter("drafted_tokens", "Draft nodes scored.", kind)
        self._accepted = counter("accepted_tokens", "Draft tokens accepted.", kind)
        self._lengths = Histogram(
            "ctc_drafter_accepted_length", "Draft tokens accepted by a step.", kind, buckets=_LENGTHS, registry=registry
        )
        self._tau = Gauge("ctc_drafter_tau", "Mean tokens of a step since the start.", kind, registry=registry)
        self._sums: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
        self._left = counter("abandoned_requests", "Requests whose client left before the end.", kind)
        self._first = histogram("time_to_first_token", "From a request to its first token.", _SECONDS)
        self._each = histogram("time_per_token", "Mean time per token after the first, by answer.", _PER_TOKEN)
        self._whole = histogram("request", "From a request to its last token.", _SECONDS)
        gauge("running", "Generations that run.", lambda: scheduler.stats().running)
        gauge("waiting", "Generations in the queue.", lambda: scheduler.stats().waiting)
        gauge("slots", "Generations that can run at once.", lambda: scheduler.slots)

    def step(self, kind: str, step: Step) -> None:
        """Count a verification step."""
        self._steps.labels(kind).inc()
        self._drafted.labels(kind).inc(step.drafted)
        self._accepted.labels(kind).inc(step.accepted)
        self._lengths.labels(kind).observe(step.accepted)
        sums = self._sums[kind]
        sums[0], sums[1] = sums[0] + len(step.tokens), sums[1] + 1
        self._tau.labels(kind).set(tau_of(sums[0], 0, sums[1]) or 0.0)

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self.registry)


class Clock:
    """Counts one call, from its arrival on."""

    def __init__(self, metrics: Metrics, reply: Reply, began: float) -> None:
        """began: the time.monotonic() of its arrival."""
        self._metrics, self._reply = metrics, reply
        self._kind = reply.call.drafter
        self._began, self._failed = began, False
        self._first: dict[int, float] = {}
        metrics._prompt.labels(self._kind).inc(sum(len(ids) for ids in reply.call.prompts))

    def count(self, said: Said) -> None:
        """Count a step."""
        metrics, kind, step = self._metrics, self._kind, said.step
        metrics._tokens.labels(kind).inc(len(step.tokens))
        if "prefill" not in step.seconds:
            metrics.step(kind, step)
        if said.index not in self._first:
            self._first[said.index] = said.at
            metrics._first.labels(kind).observe(said.at - self._began)
        if said.finish is not None:
            later = len(self._reply.choices[said.index].answer.tokens) - 1
            if later > 0:
                metrics._each.labels(kind).observe((said.at - self._first[said.index]) / later)
            if all(choice.finish is not None for choice in self._reply.choices):
                metrics._whole.labels(kind).observe(said.at - self._began)

    def fail(self) -> None:
        """The server could not finish the reply."""
        self._failed = True

    def abandon(self) -> None:
        """The connection has ended: the client has left, unless all is said or the server failed."""
        if not self._failed and any(choice.finish is None for choice in self._reply.choices):
            self._metrics._left.labels(self._kind).inc()
