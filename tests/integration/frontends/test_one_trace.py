"""One trace of a call from its front end and the engine process, as a collector got it."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from embedserve.v1 import embedding_pb2 as pb
from tests.integration.frontends.conftest import AGENT, LIMIT_S, stubs
from tests.integration.server.process import ServerProcess
from tests.integration.telemetry.collector import Collector
from tests.integration.telemetry.trace_file import ExportedSpan, TraceFile

pytestmark = [pytest.mark.process, pytest.mark.skipif(AGENT is None, reason="rotel is not installed")]

Story = tuple[TraceFile, set[str], str]
FRONT_ENDS = {"frontend-0", "frontend-1"}


@pytest.fixture
def story(collector: Collector, two: ServerProcess) -> Story:
    """What was exported, the traces of the calls, and that of a stream."""
    rng = random.Random(two.pid)

    def traced() -> tuple[str, tuple[tuple[str, str]]]:
        trace = rng.randbytes(16).hex()
        return trace, (("traceparent", f"00-{trace}-{rng.randbytes(8).hex()}-01"),)

    with stubs(two, 16) as many:
        sent: set[str] = set()
        calls = []
        for stub in many:
            trace, metadata = traced()
            sent.add(trace)
            calls.append(stub.Embed.future(pb.EmbedRequest(texts=["hello"]), metadata=metadata, timeout=LIMIT_S))
        told = [dict(call.trailing_metadata())["x-trace-id"] for call in calls if call.result()]
        assert set(told) == sent
        stream, metadata = traced()
        list(many[0].EmbedStream(pb.EmbedStreamRequest(texts=["hello"] * 24), metadata=metadata, timeout=LIMIT_S))
    collector.sink.wait_for(lambda: _whole(collector.sink.spans, sent | {stream}))
    return TraceFile(collector.trace_file), sent, stream


def _whole(spans: list[Any], sent: set[str]) -> bool:
    """Whether every request has come, and every batch that one of them links to."""
    linked = {(link.trace_id, link.span_id) for span in spans if span.name == "forward" for link in span.links}
    arrived = {span.trace_id.hex() for span in spans if span.kind == Span.SPAN_KIND_SERVER}
    return sent <= arrived and linked <= {(span.trace_id, span.span_id) for span in spans}


def request_of(file: TraceFile, trace: str) -> ExportedSpan:
    (found,) = [span for span in file.requests if span.trace_id == trace]
    return found


class TestOneTrace:
    def test_a_calls_spans_are_its_front_ends_and_its_batch_is_the_engines(self, story: Story) -> None:
        """Linked both ways over the processes, with the stages of both and no gap between them."""
        file, sent, _ = story
        requests = [request_of(file, trace) for trace in sent]
        assert {request.process for request in requests} == FRONT_ENDS
        for request in requests:
            stages = file.children(request)
            assert {"validate", "tokenize", "queue", "forward", "respond"} <= {stage.name for stage in stages}
            assert {stage.process for stage in stages} == {request.process}
            assert sum(stage.took_ns for stage in stages) == pytest.approx(request.took_ns, rel=0.01)
            (batch,) = file.batches(request)
            assert (batch.name, batch.process) == ("batch", "engine")
            assert request in file.members(batch)
            forward = file.stage(request, "forward")
            assert forward.begin_ns <= file.stage(batch, "forward").begin_ns <= forward.end_ns

    def test_a_stream_leads_to_each_of_its_batches(self, story: Story) -> None:
        file, _, trace = story
        request = request_of(file, trace)
        assert request.process in FRONT_ENDS
        batches = file.batches(request)
        assert len(batches) > 1, "a window of eight of twenty-four"
        for batch in batches:
            assert batch.process == "engine"
            assert request in file.members(batch)

    def test_each_process_is_an_instance_of_one_service(self, story: Story) -> None:
        file, _, _ = story
        instances = {(span.process, span.resource["service.instance.id"]) for span in file.spans}
        assert {process for process, _ in instances} == FRONT_ENDS | {"engine"}
        assert len(instances) == 3
        assert {span.resource["service.name"] for span in file.spans} == {"embedserve"}
        assert all(re.fullmatch("[0-9a-f-]{36}", instance) for _, instance in instances)
