"""OpenTelemetry traces of the requests that generate, by option: when each waited in line, was taken in and answered,
and with how many tokens. No text, no key and no path that a caller made up is in a span.

The packages are an extra of their own (`pip install 'ingot[otel]'`), imported when traces are asked for.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.runtime.event import Event
from server.access_log import ANSWERS, FAILED, NOBODY_WAITED, REQUEST_ID
from server.config import FROM_ENVIRONMENT
from server.guard import OWNER

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

    from server.answers import Answers

TRACE = "ingot.trace"
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
PROTOCOL = "http/protobuf"
MILLISECONDS_TO_SEND = 3000


class Traces:
    """Where spans go. They are sent by a thread of its own, some at a time; what cannot be sent is dropped."""

    def __init__(self, exporter: SpanExporter) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        named = "OTEL_SERVICE_NAME" in os.environ or "service.name" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
        resource = Resource.create({} if named else {"service.name": "ingot"})
        # The sampler is what OTEL_TRACES_SAMPLER says: by default all, and of a caller's traces those that it samples.
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("ingot")
        self._context = TraceContextTextMapPropagator()

    @classmethod
    def to(cls, where: str) -> Traces:
        """To a collector, by OTLP over HTTP: its URL, or `env` for what OpenTelemetry's environment variables say.
        ValueError where they say nothing, or the packages are not installed."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError as error:
            raise ValueError(
                "serve.traces needs OpenTelemetry, which is not installed: pip install opentelemetry-sdk "
                "opentelemetry-exporter-otlp-proto-http, or leave serve.traces out."
            ) from error
        if where != FROM_ENVIRONMENT:
            given = urlsplit(where).path not in ("", "/")
            return cls(OTLPSpanExporter(endpoint=where if given else where.rstrip("/") + "/v1/traces"))
        if not any(os.environ.get(name) for name in ENDPOINTS):
            raise ValueError(
                f"serve.traces is {FROM_ENVIRONMENT}, and neither {' nor '.join(ENDPOINTS)} is set: set one, or give "
                "the collector's URL as serve.traces=http://127.0.0.1:4318."
            )
        protocol = next((os.environ[name] for name in PROTOCOLS if os.environ.get(name)), PROTOCOL)
        if protocol != PROTOCOL:
            raise ValueError(
                f"{PROTOCOLS[1]} is {protocol!r}, but this server sends traces by {PROTOCOL} alone: set it to that, "
                "and name the collector's port for it, which is 4318 by custom."
            )
        return cls(OTLPSpanExporter())

    def request(self, method: str, headers: Mapping[str, str]) -> RequestTrace:
        """A span that begins now, under the caller's `traceparent` where it is a valid one."""
        from opentelemetry.trace import SpanKind

        carried = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        context = self._context.extract(carried)
        return RequestTrace(self, self._tracer.start_span(method, context=context, kind=SpanKind.SERVER))

    def child(self, name: str, parent: Span, began: float, ended: float, attributes: Mapping[str, Any]) -> None:
        """A span within `parent`; the times are those of `time.monotonic`."""
        from opentelemetry.trace import set_span_in_context

        epoch = time.time_ns() - time.monotonic_ns()
        span = self._tracer.start_span(
            name,
            context=set_span_in_context(parent),
            attributes=dict(attributes),
            start_time=epoch + round(began * 1e9),
        )
        span.end(epoch + round(ended * 1e9))

    def flush(self) -> None:
        """Send what there is."""
        self._provider.force_flush(MILLISECONDS_TO_SEND)

    def close(self) -> None:
        """Send what there is, if the collector takes it soon."""
        self.flush()
        self._provider.shutdown()


class RequestTrace:
    """The span of one request, and of its answers, which are written when it ends."""

    def __init__(self, traces: Traces, span: Span) -> None:
        self._traces = traces
        self._span = span
        self._asked = 0.0
        self._first: list[float] = []
        self._ended: list[float] = []
        self._latest: list[Event | None] = []

    def begin(self, answers: int) -> None:
        """So many answers are asked of the engine now."""
        self._asked = time.monotonic()
        self._first, self._ended, self._latest = [0.0] * answers, [0.0] * answers, [None] * answers

    def take(self, index: int, event: Event) -> None:
        """An event of answer number `index` has come."""
        now = time.monotonic()
        if event.token_ids and not self._first[index]:
            self._first[index] = now
        if event.finish_reason is not None:
            self._ended[index] = now
        self._latest[index] = event

    def end(self, scope: Scope, status: int, model: str) -> None:
        """The request is over, in whichever way."""
        from opentelemetry.trace import StatusCode

        span = self._span
        if span.is_recording():
            route = getattr(scope.get("route"), "path", None)
            if route is not None:
                span.update_name(f"{scope['method']} {route}")
                span.set_attribute("http.route", route)
            span.set_attributes({"http.request.method": scope["method"], "http.response.status_code": status})
            span.set_attribute("ingot.request_id", scope[REQUEST_ID])
            if owner := scope.get(OWNER):
                span.set_attribute("ingot.key", owner)
            if status >= FAILED:
                span.set_status(StatusCode.ERROR)
            answers: Answers | None = scope.get(ANSWERS)
            if answers is not None:
                usage = answers.usage()
                span.set_attribute("gen_ai.request.model", model)
                span.set_attribute("gen_ai.usage.input_tokens", usage["prompt_tokens"])
                span.set_attribute("gen_ai.usage.output_tokens", usage["completion_tokens"])
                for index in range(len(self._latest)):
                    self._write_answer(index)
        span.end()

    def _write_answer(self, index: int) -> None:
        """`queue` until the engine begins, `prefill` until the first token, `decode` until the end."""
        event, first, ended = self._latest[index], self._first[index], self._ended[index] or time.monotonic()
        number: dict[str, Any] = {"ingot.answer": index}
        if event is None or not event.admitted:
            self._traces.child("queue", self._span, self._asked, ended, number)
            return
        reason = {"ingot.finish_reason": event.finish_reason or "abort"}
        taken = {"ingot.prompt_tokens": event.prompt_tokens, "ingot.cached_tokens": event.cached_tokens}
        drawn = {"ingot.completion_tokens": event.completion_tokens}
        self._traces.child("queue", self._span, self._asked, event.admitted, number)
        self._traces.child("prefill", self._span, event.admitted, first or ended, number | taken)
        if first:
            self._traces.child("decode", self._span, first, ended, number | drawn | reason)


class TraceRequests:
    """A span for every POST. It must see the scope that the router changes."""

    def __init__(self, app: ASGIApp, traces: Traces, model: str) -> None:
        self._app = app
        self._traces = traces
        self._model = model

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        trace = scope[TRACE] = self._traces.request(scope["method"], Headers(scope=scope))
        status = NOBODY_WAITED

        async def send_with_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_with_status)
        except Exception:
            status = FAILED
            raise
        finally:
            trace.end(scope, status, self._model)


def trace_of(request: Request) -> RequestTrace | None:
    """What is told of the answers to a request; None where nobody asked for traces."""
    trace: RequestTrace | None = request.scope.get(TRACE)
    return trace
