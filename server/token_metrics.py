"""Metrics that every token changes: plain numbers, made into Prometheus' families when they are read. A token costs a
seventh of what the library's own counters take, which have locks; here all of it happens in the event loop."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector


class TokenMetrics(Collector):
    """How many tokens came, and a histogram of the seconds between them with upper bounds `buckets`."""

    def __init__(self, model: str, buckets: Sequence[float]) -> None:
        self._model = model
        self._bounds = list(buckets)
        self._counts = [0] * (len(buckets) + 1)
        self._seconds = 0.0
        self.generated = 0

    def observe_gap(self, seconds: float, count: int) -> None:
        """`count` tokens came, each `seconds` after the one before it."""
        self._counts[bisect_left(self._bounds, seconds)] += count
        self._seconds += seconds * count

    def collect(self) -> Iterator[Metric]:
        tokens = CounterMetricFamily("ingot:generation_tokens", "Tokens that were generated.", labels=["model_name"])
        tokens.add_metric([self._model], self.generated)
        yield tokens
        gaps = HistogramMetricFamily(
            "ingot:inter_token_latency_seconds", "Between two tokens of an answer.", labels=["model_name"]
        )
        bounds = [*map(str, self._bounds), "+Inf"]
        gaps.add_metric([self._model], list(zip(bounds, accumulate(self._counts), strict=True)), self._seconds)
        yield gaps
