"""Spans of generations: whose part they are, their order and times, and how they come to a collector."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from deployments.generation import ErrorItem
from deployments.ingress import IngressConfig, create_app
from deployments.origin import Origin
from deployments.traces import IngressTraces, ReplicaTraces, start_tracing
from engine.core.phases import Phase, PhaseSpan, RequestPhases
from engine.errors import ConfigError, OverloadedError
from engine.explanation import Loss
from tests.deployments.conftest import ScriptedEngine
from tests.deployments.test_request_log import EXPLANATION, LAST, STATS

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
UNSAMPLED = PARENT[:-1] + "0"
BODY: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "secret"}], "max_tokens": 3}
SPANS = (
    PhaseSpan(Phase.QUEUE, 7.0, 7.5),
    PhaseSpan(Phase.LOAD, 7.5, 7.75),
    PhaseSpan(Phase.PREFILL, 7.75, 8.0),
    PhaseSpan(Phase.DECODE, 8.0, 9.0),
)
PHASED = replace(EXPLANATION, stats=replace(STATS, phases=RequestPhases(queue_s=0.5, spans=SPANS)))


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def provider(exporter: InMemorySpanExporter) -> TracerProvider:
    made = TracerProvider(shutdown_on_exit=False)
    made.add_span_processor(SimpleSpanProcessor(exporter))
    return made


@pytest.fixture
async def traced(engine: ScriptedEngine, provider: TracerProvider, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    config = IngressConfig(store_url=f"sqlite:///{tmp_path / 'c.db'}")
    app = create_app(engine, config, ingress_id="i", watches=[IngressTraces(provider)])
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


def ids(span: ReadableSpan) -> tuple[str, str, str | None]:
    context = span.get_span_context()
    assert context is not None
    parent = None if span.parent is None else f"{span.parent.span_id:016x}"
    return f"{context.trace_id:032x}", f"{context.span_id:016x}", parent


async def test_one_span_for_each_phase_and_all_of_one_trace(
    traced: httpx.AsyncClient, engine: ScriptedEngine, provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    engine.items = [replace(LAST, delta=replace(LAST.delta, explanation=PHASED))]
    answer = await traced.post("/v1/chat/completions", json=BODY, headers={"traceparent": PARENT})
    assert answer.status_code == 200
    (request,) = engine.requests
    ReplicaTraces(provider).add_phases(request.origin, PHASED, 2)

    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert list(spans) == ["route", "chat tiny", "prepare", "queue", "load", "prefill", "decode"]
    trace_id, chat_id, parent_id = ids(spans["chat tiny"])
    assert (trace_id, parent_id) == tuple(PARENT.split("-")[1:3])
    for name, span in spans.items():
        assert name == "chat tiny" or (ids(span)[0], ids(span)[2]) == (trace_id, chat_id)
    assert request.origin.traceparent.split("-")[2] == chat_id, "the replica is told whose part its spans are"

    phases = [spans[name] for name in ("prepare", "queue", "load", "prefill", "decode")]
    starts = [(span.start_time or 0) / 1e9 - 1e9 for span in phases]
    assert starts == pytest.approx([0.0, 0.25, 0.75, 1.0, 1.25], abs=1e-5)
    for before, after in itertools.pairwise(phases):
        assert before.end_time == pytest.approx(after.start_time, abs=1000)
    chat, prefill = spans["chat tiny"].attributes, spans["prefill"].attributes
    assert chat is not None
    assert prefill is not None
    assert chat["gen_ai.operation.name"] == "chat"
    assert (chat["gen_ai.request.model"], chat["gen_ai.request.max_tokens"]) == ("tiny", 3)
    assert (chat["gen_ai.usage.input_tokens"], chat["gen_ai.usage.cache_read.input_tokens"]) == (5, 3)
    assert chat["gen_ai.response.finish_reasons"] == ("stop",)
    assert (prefill["pensieve.cached_tokens.gpu"], prefill["pensieve.computed_tokens.new"]) == (3, 2)
    assert (spans["route"].attributes or {})["pensieve.is_home"] is True
    assert "secret" not in "".join(span.to_json() for span in spans.values())


async def test_a_lost_replica_and_an_error(
    traced: httpx.AsyncClient, engine: ScriptedEngine, exporter: InMemorySpanExporter
) -> None:
    assert EXPLANATION.route is not None
    loss = Loss(at_s=1e9 + 1, kind="ReplicaLostError", num_output_tokens=4)
    lost = replace(EXPLANATION, route=replace(EXPLANATION.route, lost_s=2.0, losses=(loss,)))
    engine.items = [replace(LAST, delta=replace(LAST.delta, explanation=lost))]
    await traced.post("/v1/completions", json={"model": "tiny", "prompt": "hi"})
    route, whole = exporter.get_finished_spans()
    assert whole.name == "text_completion tiny"
    (event,) = route.events
    assert (event.name, event.timestamp) == ("replica_lost", 1_000_000_001_000_000_000)
    assert (event.attributes or {})["gen_ai.usage.output_tokens"] == 4

    exporter.clear()
    engine.items = [ErrorItem.of(OverloadedError("full"))]
    await traced.post("/v1/completions", json={"model": "tiny", "prompt": "hi"})
    (failed,) = exporter.get_finished_spans()
    assert not failed.status.is_ok
    assert (failed.attributes or {})["error.type"] == "OverloadedError"


async def test_a_client_that_does_not_record_its_trace(
    traced: httpx.AsyncClient, engine: ScriptedEngine, provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    engine.items = [LAST]
    await traced.post("/v1/chat/completions", json=BODY, headers={"traceparent": UNSAMPLED})
    (request,) = engine.requests
    ReplicaTraces(provider).add_phases(request.origin, PHASED, 2)
    assert not request.origin.is_sampled
    assert not exporter.get_finished_spans()


class Collector(BaseHTTPRequestHandler):
    """Takes what OTLP sends."""

    received: list[ExportTraceServiceRequest]

    def do_POST(self) -> None:
        message = ExportTraceServiceRequest()
        message.ParseFromString(self.rfile.read(int(self.headers["content-length"])))
        self.received.append(message)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


def test_spans_reach_a_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    handler = type("Handler", (Collector,), {"received": []})
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
        traces = ReplicaTraces(start_tracing("otlp"))
        traces.add_phases(Origin("r-1", PARENT), PHASED, 2)
        traces.close()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    (message,) = handler.received
    (resource,) = message.resource_spans
    told = {each.key: each.value.string_value for each in resource.resource.attributes}
    assert (told["service.name"], told["deployment.environment"]) == ("pensieve", "test")
    spans = resource.scope_spans[0].spans
    assert [span.name for span in spans] == ["prepare", "queue", "load", "prefill", "decode"]
    assert {span.trace_id.hex() for span in spans} == {PARENT.split("-")[1]}


def test_missing_packages_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"pensieve-ray\[traces\]"):
        start_tracing("otlp")
