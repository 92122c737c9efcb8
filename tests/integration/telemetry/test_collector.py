"""Spans and metrics pass through a real OTLP collector whole: links both ways, parents, exemplars."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from embedserve.telemetry.settings import TelemetrySettings
from embedserve.telemetry.setup import setup_telemetry
from tests.integration.telemetry.collector import Collector, collecting, rotel_agent
from tests.integration.telemetry.traffic import METHOD, ride_together

AGENT = rotel_agent()
pytestmark = pytest.mark.skipif(AGENT is None, reason="rotel is not installed")

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
METADATA: list[list[tuple[str, str | bytes]]] = [[("traceparent", f"00-{TRACE}-{PARENT}-01")], [], []]


@pytest.fixture
def collector(tmp_path: Path) -> Iterator[Collector]:
    assert AGENT is not None
    with collecting(AGENT, tmp_path) as running:
        yield running


def send(monkeypatch: pytest.MonkeyPatch, collector: Collector, protocol: str) -> list[Span]:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint_of(collector, protocol))
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_on")
    monkeypatch.setenv("OTEL_LOGS_EXPORTER", "otlp")
    telemetry = setup_telemetry(
        TelemetrySettings(service_version="1.2.3", resource_attributes={"embedserve.model": "m"})
    )

    async def serve() -> None:
        ride_together(telemetry, METADATA)
        structlog.get_logger("embedserve.test").warning("said", of="this")

    asyncio.run(serve())
    assert telemetry.shutdown(20)
    # 3 calls of 8 spans, one pass of 8
    collector.sink.wait_for(lambda: len(collector.sink.spans) >= 32 and len(collector.sink.metrics) > 40)
    return collector.sink.spans


def endpoint_of(collector: Collector, protocol: str) -> str:
    return collector.grpc_endpoint if protocol == "grpc" else collector.http_endpoint


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
class TestCollector:
    def test_spans_arrive_with_links_both_ways(
        self, monkeypatch: pytest.MonkeyPatch, collector: Collector, protocol: str
    ) -> None:
        spans = send(monkeypatch, collector, protocol)

        servers = [span for span in spans if span.name == METHOD]
        (batch,) = [span for span in spans if span.name == "batch"]
        forwards = [span for span in spans if span.name == "forward" and span.trace_id != batch.trace_id]
        assert 3 == len(servers) == len(forwards)
        assert {(s.trace_id, s.span_id) for s in servers} == {(link.trace_id, link.span_id) for link in batch.links}
        assert {s.span_id for s in servers} == {forward.parent_span_id for forward in forwards}
        for forward in forwards:
            assert [(batch.trace_id, batch.span_id)] == [(link.trace_id, link.span_id) for link in forward.links]
        assert (bytes.fromhex(TRACE), bytes.fromhex(PARENT)) in {(s.trace_id, s.parent_span_id) for s in servers}
        assert servers[0].kind == Span.SPAN_KIND_SERVER
        for parent in (*servers, batch):
            children = [span for span in spans if span.parent_span_id == parent.span_id]
            took = parent.end_time_unix_nano - parent.start_time_unix_nano
            assert took == sum(child.end_time_unix_nano - child.start_time_unix_nano for child in children)

    def test_log_records_arrive(self, monkeypatch: pytest.MonkeyPatch, collector: Collector, protocol: str) -> None:
        send(monkeypatch, collector, protocol)
        collector.sink.wait_for(lambda: bool(collector.sink.logs))

        said = [record for record in collector.sink.logs if record.event_name == "said"]
        assert [(record.severity_text, record.body.string_value) for record in said] == [("WARNING", "said")]
        assert {a.key: a.value.string_value for a in said[0].attributes} == {"of": "this", "logger": "embedserve.test"}

    def test_the_resource_and_the_metrics_arrive(
        self, monkeypatch: pytest.MonkeyPatch, collector: Collector, protocol: str
    ) -> None:
        spans = send(monkeypatch, collector, protocol)

        attributes = {a.key: a.value.string_value for a in collector.sink.resources[0].attributes}
        assert tuple(attributes[key] for key in ("service.name", "service.version", "embedserve.model")) == (
            "embedserve",
            "1.2.3",
            "m",
        )
        points = collector.sink.metrics["rpc.server.call.duration"].histogram.data_points
        (answered,) = [point for point in points if point.count]
        assert answered.count == 3
        assert {e.trace_id for e in answered.exemplars} <= {span.trace_id for span in spans if span.name == METHOD}
        assert len(answered.exemplars) >= 1
        (requests,) = [
            point.as_double or point.as_int
            for point in collector.sink.metrics["embedserve.requests"].sum.data_points
            if point.attributes[0].value.string_value == "done"
        ]
        assert requests == 3
