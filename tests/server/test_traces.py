import re
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from cli.main import main
from server.config import ServeConfig
from server.traces import Traces
from tests.cli.test_serve import server
from tests.server.conftest import CONFIG
from tests.server.running import HEADERS, KEY, Served, serving
from tests.tiny_artifact import write_tiny_artifact

pytest.importorskip("opentelemetry.sdk", reason="traces need OpenTelemetry")
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

SECRET = "the rain in the secret"
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Traces, InMemorySpanExporter]]:
    folder, exporter = tmp_path_factory.mktemp("traced"), InMemorySpanExporter()
    traces = Traces(exporter)
    with serving(folder, write_tiny_artifact(folder), CONFIG, traces=traces) as served:
        yield served, traces, exporter
    traces.close()


def ask(served: Served, body: dict[str, Any], **headers: str) -> httpx.Response:
    asked = {"model": "tiny", "prompt": SECRET, "ignore_eos": True, **body}
    return httpx.post(f"{served.url}/v1/completions", json=asked, headers={**HEADERS, **headers}, timeout=60)


def spans_of(
    traces: Traces, exporter: InMemorySpanExporter, request_id: str
) -> tuple[ReadableSpan, list[ReadableSpan]]:
    """The span of a request and those within it; it is written after the client has its answer."""
    deadline = time.monotonic() + 20
    while True:
        traces.flush()
        found = exporter.get_finished_spans()
        requests = [span for span in found if (span.attributes or {}).get("ingot.request_id") == request_id]
        if requests:
            [request] = requests
            return request, [span for span in found if span.parent and span.parent.span_id == request.context.span_id]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_span_with_the_times_of_its_answers(
    traced: tuple[Served, Traces, InMemorySpanExporter], stream: bool
) -> None:
    served, traces, exporter = traced
    began = time.time_ns()
    response = ask(served, {"max_tokens": 5, "n": 2, "stream": stream})
    span, children = spans_of(traces, exporter, response.headers["x-request-id"])
    ended = time.time_ns()
    prompt = len(served.tokenizer.encode(SECRET))
    attributes = dict(span.attributes or {})
    assert (span.name, span.kind.name, span.parent) == ("POST /v1/completions", "SERVER", None)
    assert attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "ingot.request_id": response.headers["x-request-id"],
        "ingot.key": "test",
        "gen_ai.request.model": "tiny",
        "gen_ai.usage.input_tokens": prompt,
        "gen_ai.usage.output_tokens": 10,
    }
    assert span.resource.attributes["service.name"] == "ingot"
    for answer in range(2):
        queue, prefill, decode = (each for each in children if (each.attributes or {})["ingot.answer"] == answer)
        assert [each.name for each in (queue, prefill, decode)] == ["queue", "prefill", "decode"]
        assert (prefill.attributes or {})["ingot.prompt_tokens"] == prompt
        assert (decode.attributes or {})["ingot.completion_tokens"] == 5
        assert (decode.attributes or {})["ingot.finish_reason"] == "length"
        times = [began, span.start_time, queue.start_time, queue.end_time, prefill.end_time, decode.end_time, ended]
        # The two clocks are compared once a span, to some microseconds.
        assert all(before <= after + 1e6 for before, after in pairwise(times)), times
        assert queue.end_time - prefill.start_time < 1e6
    told = "".join(each.to_json() for each in (span, *children))
    assert SECRET not in told
    assert KEY not in told


def test_the_callers_trace_goes_on(traced: tuple[Served, Traces, InMemorySpanExporter]) -> None:
    served, traces, exporter = traced
    response = ask(served, {"max_tokens": 1}, traceparent=f"00-{TRACE_ID}-{PARENT_ID}-01")
    span, children = spans_of(traces, exporter, response.headers["x-request-id"])
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == PARENT_ID
    assert {f"{each.context.trace_id:032x}" for each in (span, *children)} == {TRACE_ID}
    for wrong in ("00-zz-zz-01", "", f"00-{'0' * 32}-{PARENT_ID}-01"):
        response = ask(served, {"max_tokens": 1}, traceparent=wrong)
        assert spans_of(traces, exporter, response.headers["x-request-id"])[0].parent is None
    # A caller that does not record its trace has none recorded here either.
    response = ask(served, {"max_tokens": 1}, traceparent=f"00-{TRACE_ID}-{PARENT_ID}-00")
    later = ask(served, {"max_tokens": 1})
    spans_of(traces, exporter, later.headers["x-request-id"])
    assert not any(response.headers["x-request-id"] in span.to_json() for span in exporter.get_finished_spans())


def test_refusals_and_those_who_leave_have_a_span_too(traced: tuple[Served, Traces, InMemorySpanExporter]) -> None:
    served, traces, exporter = traced
    refused = ask(served, {"max_tokens": -1})
    span, children = spans_of(traces, exporter, refused.headers["x-request-id"])
    assert ((span.attributes or {})["http.response.status_code"], children) == (400, [])
    wrong = httpx.post(f"{served.url}/{KEY}", headers={"Authorization": "Bearer wrong", "X-Request-ID": "mine"})
    span, _ = spans_of(traces, exporter, "mine")
    assert (wrong.status_code, span.name) == (401, "POST")
    assert KEY not in span.to_json()
    body = {"model": "tiny", "prompt": SECRET, "ignore_eos": True, "max_tokens": 100, "n": 16, "stream": True}
    headers = {**HEADERS, "X-Request-ID": "left"}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body, headers=headers, timeout=60) as answer:
        next(answer.iter_lines())
    span, children = spans_of(traces, exporter, "left")
    assert len({(each.attributes or {})["ingot.answer"] for each in children}) == 16
    reasons = {(each.attributes or {}).get("ingot.finish_reason") for each in children if each.name == "decode"}
    assert "abort" in reasons


@pytest.fixture
def collector() -> Iterator[tuple[str, list[Any]]]:
    """A collector of OTLP over HTTP: its URL and what it was sent."""
    taken: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            taken.append((self.path, self.headers, content))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}", taken
        listening.shutdown()
        thread.join()


@pytest.mark.parametrize("how", ["option", "environment"])
def test_a_server_sends_them_to_a_collector(tmp_path: Path, collector: tuple[str, list[Any]], how: str) -> None:
    url, taken = collector
    write_tiny_artifact(tmp_path / "tiny")
    option = f"serve.traces={url}" if how == "option" else "serve.traces=env"
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_SERVICE_NAME": "mine", "OTEL_EXPORTER_OTLP_HEADERS": "a=b"}
    with server(f"folder={tmp_path / 'tiny'}", option, **(environment if how == "environment" else {})) as (
        process,
        at,
    ):
        body = {"model": "tiny", "prompt": SECRET, "max_tokens": 3, "ignore_eos": True}
        assert httpx.post(f"{at}/v1/completions", json=body, timeout=60).status_code == 200
        process.terminate()
        assert process.wait(30) == 0
    spans = []
    for path, headers, content in taken:
        assert (path, headers["Content-Type"]) == ("/v1/traces", "application/x-protobuf")
        assert headers.get("a") == ("b" if how == "environment" else None)
        for of_resource in ExportTraceServiceRequest.FromString(content).resource_spans:
            names = {each.key: each.value.string_value for each in of_resource.resource.attributes}
            assert names["service.name"] == ("mine" if how == "environment" else "ingot")
            spans += [span.name for scoped in of_resource.scope_spans for span in scoped.spans]
        assert b"secret" not in content
    assert sorted(spans) == ["POST /v1/completions", "decode", "prefill", "queue"]


def test_a_collector_that_is_not_there_holds_up_nothing(tmp_path: Path) -> None:
    write_tiny_artifact(tmp_path / "tiny")
    with server(f"folder={tmp_path / 'tiny'}", "serve.traces=http://127.0.0.1:9") as (process, at):
        body = {"model": "tiny", "prompt": SECRET, "max_tokens": 3, "ignore_eos": True}
        assert httpx.post(f"{at}/v1/completions", json=body, timeout=60).status_code == 200
        process.terminate()
        _, said = process.communicate(timeout=30)
        assert process.returncode == 0
        assert "Traceback" not in said


def test_off_by_default_whatever_the_environment_says() -> None:
    assert ServeConfig().traces is None
    for wrong in ("", "localhost:4318", "ftp://x", "http://user:password@host", "on"):
        with pytest.raises(ValueError, match=re.escape(f"serve.traces is {wrong!r}, but must be null, the URL of")):
            ServeConfig(traces=wrong)


@pytest.mark.parametrize(
    ("environment", "missing", "said"),
    [
        ({}, False, "neither OTEL_EXPORTER_OTLP_TRACES_ENDPOINT nor OTEL_EXPORTER_OTLP_ENDPOINT is set"),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            False,
            "OTEL_EXPORTER_OTLP_PROTOCOL is 'grpc', but this server sends traces by http/protobuf alone",
        ),
        ({}, True, "serve.traces needs OpenTelemetry, which is not installed: pip install opentelemetry-sdk"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_loaded(
    tmp_path: Path,
    environment: dict[str, str],
    missing: bool,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if missing:
        monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    assert main(["serve", f"folder={tmp_path}", "serve.traces=env"]) == 1
    assert said in capsys.readouterr().err
