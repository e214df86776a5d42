"""What Prometheus reads at /metrics, named as vLLM names it. Nothing here holds a text or a key; callers have no label,
since their number is not bounded."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.responses import Response

from engine.runtime.client import EngineClient, EngineError
from engine.runtime.event import Event
from server.token_metrics import TokenMetrics

SECONDS_FOR_FIGURES = 2.0
FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
WHOLE = (0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0)
GAUGES = {
    "running": ("num_requests_running", "Requests that the engine computes."),
    "waiting": ("num_requests_waiting", "Requests that wait for their turn."),
    "cache_usage": ("kv_cache_usage_perc", "Share of the KV cache's pages that requests hold; 1 is all of them."),
    "preemptions": ("num_preemptions", "Requests that gave their pages back and waited again, since the start."),
}


class Metrics:
    """The counters of one application."""

    def __init__(self, model_name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._registry = registry = CollectorRegistry()
        self._model = model_name
        self._figures = {
            key: Gauge(f"ingot:{name}", help_, ["model_name"], registry=registry).labels(model_name)
            for key, (name, help_) in GAUGES.items()
        }

        def counter(name: str, help_: str) -> Counter:
            return Counter(f"ingot:{name}", help_, ["model_name"], registry=registry).labels(model_name)

        def histogram(name: str, help_: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(f"ingot:{name}_seconds", help_, ["model_name"], registry=registry, buckets=buckets)
            return made.labels(model_name)

        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts that were taken in.")
        self.prefix_queries = counter("prefix_cache_queries", "Tokens of prompts that the prefix cache was asked for.")
        self.prefix_hits = counter("prefix_cache_hits", "Tokens of prompts that the prefix cache had.")
        self.aborted = counter(
            "request_aborted", "Requests that ended before their answer: by a client, or a deadline."
        )
        self.first_token = histogram("time_to_first_token", "From the request to its first token.", FIRST)
        self.tokens = TokenMetrics(model_name, BETWEEN)
        registry.register(self.tokens)
        self.whole = histogram("e2e_request_latency", "From the request to the end of its answer.", WHOLE)
        self._success = Counter(
            "ingot:request_success", "Answers.", ["model_name", "finished_reason"], registry=registry
        )
        self._refused = Counter(
            "ingot:request_refused", "Requests not let in.", ["model_name", "reason"], registry=registry
        )
        self.refused("rate_limit_exceeded", 0)

    def ended(self, reason: str) -> None:
        self._success.labels(self._model, reason).inc()

    def refused(self, reason: str, count: int = 1) -> None:
        self._refused.labels(self._model, reason).inc(count)

    def track(self, count: int) -> Track:
        """What is to be told of the events of `count` answers that begin now."""
        return Track(self, count)

    async def respond(self, client: EngineClient) -> Response:
        """The text for Prometheus. Where the engine does not say its figures in time, the last ones stand."""
        try:
            figures = await asyncio.wait_for(client.figures(), SECONDS_FOR_FIGURES)
        except (TimeoutError, EngineError):
            figures = {}
        for key, value in figures.items():
            self._figures[key].set(value)
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)


class Track:
    """Times and counts of the answers to one request. `close` counts those that have not ended; it may be called
    twice."""

    def __init__(self, metrics: Metrics, count: int) -> None:
        self._metrics = metrics
        self._began = metrics.clock()
        self._latest: list[float | None] = [None] * count
        self._unfinished = count

    def take(self, index: int, event: Event) -> None:
        """An event of answer number `index` has come."""
        metrics, now, before = self._metrics, self._metrics.clock(), self._latest[index]
        if count := len(event.token_ids):
            if before is None:
                metrics.first_token.observe(now - self._began)
                metrics.prompt_tokens.inc(event.prompt_tokens)
                metrics.prefix_queries.inc(event.prompt_tokens)
                metrics.prefix_hits.inc(event.cached_tokens)
            else:
                # Several come at once to a reader who is slow: as if evenly spaced.
                metrics.tokens.observe_gap((now - before) / count, count)
            self._latest[index] = now
            metrics.tokens.generated += count
        if event.finish_reason is not None:
            self._unfinished -= 1
            metrics.whole.observe(now - self._began)
            metrics.ended(event.finish_reason)

    def close(self) -> None:
        self._metrics.aborted.inc(self._unfinished)
        self._unfinished = 0
