"""What a real collector and a real Prometheus receive of a real server process."""

from __future__ import annotations

import asyncio
import collections
import itertools
import random
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any

import grpc
import grpc.aio
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from embedserve.v1 import embedding_pb2 as pb
from embedserve.v1.embedding_pb2_grpc import EmbeddingServiceStub
from tests.integration.clients.paced_server import PACED
from tests.integration.server.process import FAKE, QUICK, ServerProcess, running
from tests.integration.telemetry import collector as rotel
from tests.integration.telemetry.prometheus_server import PROMETHEUS, ask, scraping

AGENT = rotel.rotel_agent()
pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(AGENT is None, reason="rotel is not installed"),
]
EMBED, STREAM = "embedserve.v1.EmbeddingService/Embed", "embedserve.v1.EmbeddingService/EmbedStream"
CALLS = 60


@dataclass
class Sent:
    """A call with a trace of its own."""

    trace_id: bytes
    parent_id: bytes
    method: str
    took_ns: int
    told: str | None
    """The x-trace-id that came back."""


@dataclass
class Watched:
    """A server that exports, who receives it, and what was sent to it."""

    server: ServerProcess
    sink: rotel.Sink
    sent: list[Sent]

    def spans(self, **having: object) -> list[Span]:
        with self.sink.arrived:
            return [s for s in self.sink.spans if all(getattr(s, name) == value for name, value in having.items())]


async def send(address: str) -> list[Sent]:
    """Calls of both kinds, 8 at a time, each with a sampled traceparent."""
    rng = random.Random(23)
    gate = asyncio.Semaphore(8)

    async def one(stub: Any, number: int) -> Sent:
        trace_id, parent_id = rng.randbytes(16), rng.randbytes(8)
        metadata = (("traceparent", f"00-{trace_id.hex()}-{parent_id.hex()}-01"),)
        texts = [" ".join(rng.choices(["hello", "world", "text"], k=rng.randint(1, 60))) for _ in range(3)]
        async with gate:
            begun = time.monotonic_ns()
            if number % 4:
                call, method = stub.Embed(pb.EmbedRequest(texts=texts), metadata=metadata), EMBED
                await call
            else:
                call, method = stub.EmbedStream(pb.EmbedStreamRequest(texts=texts), metadata=metadata), STREAM
                while await call.read() is not grpc.aio.EOF:
                    pass
            took = time.monotonic_ns() - begun
        trailers = dict(await call.trailing_metadata() or ()) | dict(await call.initial_metadata() or ())
        return Sent(trace_id, parent_id, method, took, trailers.get("x-trace-id"))

    async with grpc.aio.insecure_channel(address) as channel:
        stub = EmbeddingServiceStub(channel)
        await stub.Embed(pb.EmbedRequest(texts=["warm"]), metadata=(("traceparent", f"00-{'1' * 32}-{'2' * 16}-00"),))
        return await asyncio.gather(*(one(stub, number) for number in range(CALLS)))


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    assert AGENT is not None
    with (
        rotel.collecting(AGENT, tmp_path_factory.mktemp("rotel")) as collector,
        running(
            *QUICK,
            command=PACED,
            PASS_MS="5",
            OTEL_EXPORTER_OTLP_ENDPOINT=collector.grpc_endpoint,
            OTEL_EXPORTER_OTLP_PROTOCOL="grpc",
            OTEL_BSP_SCHEDULE_DELAY="100",
            OTEL_METRIC_EXPORT_INTERVAL="500",
        ) as server,
    ):
        sent = asyncio.run(send(server.address))
        traces = {call.trace_id for call in sent}

        def whole() -> bool:
            names = collections.Counter(s.name for s in collector.sink.spans if s.trace_id in traces)
            linked = {(k.trace_id, k.span_id) for s in collector.sink.spans if s.name == "forward" for k in s.links}
            there = {(s.trace_id, s.span_id) for s in collector.sink.spans if s.name == "batch"}
            return names[EMBED] + names[STREAM] == names["respond"] == CALLS and linked <= there

        collector.sink.wait_for(whole)
        yield Watched(server, collector.sink, sent)


def duration(span: Span) -> int:
    return int(span.end_time_unix_nano - span.start_time_unix_nano)


class TestSpans:
    """Every stage of a call, in the caller's own trace."""

    def test_each_call_is_a_child_of_its_callers_span(self, watched: Watched) -> None:
        for call in watched.sent:
            (server,) = watched.spans(trace_id=call.trace_id, kind=Span.SPAN_KIND_SERVER)
            assert (server.name, server.parent_span_id) == (call.method, call.parent_id)
            assert duration(server) <= call.took_ns
            assert call.told == call.trace_id.hex()

    def test_the_stages_are_there_and_follow_each_other_without_gaps_to_the_end(self, watched: Watched) -> None:
        for call in watched.sent:
            (server,) = watched.spans(trace_id=call.trace_id, kind=Span.SPAN_KIND_SERVER)
            stages = watched.spans(trace_id=call.trace_id, parent_span_id=server.span_id)
            names = {span.name for span in stages}
            assert {"receive", "validate", "admit", "tokenize", "queue", "forward", "respond"} <= names
            stages.sort(key=lambda span: span.start_time_unix_nano)
            for before, after in itertools.pairwise(stages):
                assert before.end_time_unix_nano == after.start_time_unix_nano
            assert stages[0].start_time_unix_nano >= server.start_time_unix_nano
            assert stages[-1].end_time_unix_nano == server.end_time_unix_nano

    def test_the_stages_add_up_to_the_call(self, watched: Watched) -> None:
        for call in watched.sent:
            (server,) = watched.spans(trace_id=call.trace_id, kind=Span.SPAN_KIND_SERVER)
            stages = watched.spans(trace_id=call.trace_id, parent_span_id=server.span_id)
            assert sum(map(duration, stages)) == pytest.approx(duration(server), rel=0.01)

    def test_batches_have_traces_of_their_own_and_links_go_both_ways(self, watched: Watched) -> None:
        batches = {(b.trace_id, b.span_id): b for b in watched.spans(name="batch")}
        callers = {call.trace_id for call in watched.sent}
        assert not callers & {trace_id for trace_id, _ in batches}
        assert not any(batch.parent_span_id for batch in batches.values())
        linked = 0
        for call in watched.sent:
            (server,) = watched.spans(trace_id=call.trace_id, kind=Span.SPAN_KIND_SERVER)
            (forward,) = watched.spans(trace_id=call.trace_id, name="forward")
            assert forward.links
            for link in forward.links:
                batch = batches[link.trace_id, link.span_id]
                assert (server.trace_id, server.span_id) in {(back.trace_id, back.span_id) for back in batch.links}
                linked += 1
        assert linked >= CALLS
        assert max(len(batch.links) for batch in batches.values()) > 1, "no two calls shared a batch"

    def test_a_batchs_stages_add_up_too(self, watched: Watched) -> None:
        for batch in watched.spans(name="batch"):
            stages = watched.spans(trace_id=batch.trace_id, parent_span_id=batch.span_id)
            assert {"assemble", "copy_in", "forward", "pool", "copy_out"} <= {span.name for span in stages}
            assert sum(map(duration, stages)) == pytest.approx(duration(batch), rel=0.01)

    def test_a_caller_that_does_not_sample_has_no_spans(self, watched: Watched) -> None:
        assert not watched.spans(trace_id=bytes.fromhex("1" * 32))

    def test_metrics_arrive_over_otlp_too(self, watched: Watched) -> None:
        watched.sink.wait_for(lambda: "rpc.server.call.duration" in watched.sink.metrics)

        assert any(name.startswith("embedserve.") for name in watched.sink.metrics)


@pytest.fixture(scope="module")
def prometheus(watched: Watched, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with scraping([watched.server.ready["operations"]], tmp_path_factory.mktemp("prometheus"), every="300ms") as url:
        yield url


@pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not installed")
class TestPrometheus:
    """A real Prometheus scrapes the operations port."""

    def test_calls_are_counted_by_method_and_status(self, watched: Watched, prometheus: str) -> None:
        query = f'rpc_server_call_duration_seconds_count{{rpc_method="{EMBED}",rpc_response_status_code="OK"}} > 0'
        (series,) = ask(prometheus, "/api/v1/query", query=query)

        unary = sum(call.method == EMBED for call in watched.sent)
        assert float(series["value"][1]) == unary + 1

    def test_our_own_series_are_there(self, prometheus: str) -> None:
        found = ask(prometheus, "/api/v1/query", query='count by (__name__) ({__name__=~"embedserve_.+"})')

        assert len(found) > 30

    def test_exemplars_lead_to_traces_that_were_sent(self, watched: Watched, prometheus: str) -> None:
        exemplars = ask(
            prometheus, "/api/v1/query_exemplars", query="rpc_server_call_duration_seconds_bucket",
            start=str(time.time() - 120), end=str(time.time() + 60),
        )  # fmt: skip

        ids = {exemplar["labels"]["trace_id"] for series in exemplars for exemplar in series["exemplars"]}
        assert ids
        assert ids <= {call.trace_id.hex() for call in watched.sent}


class TestDeadCollector:
    """A collector that takes connections and never says a word costs nobody anything."""

    FLUSH_MS = 700

    def test_calls_are_as_fast_and_the_end_is_bounded(self) -> None:
        """As those of a server that exports nothing, asked in turn with it: a busy machine is busy for both."""
        with ExitStack() as stack:
            silent = stack.enter_context(socket.socket())
            silent.bind(("127.0.0.1", 0))
            silent.listen(64)
            exporting = {
                "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}",
                "OTEL_TRACES_SAMPLER": "always_on",
                "OTEL_BSP_SCHEDULE_DELAY": "10",
            }
            flags = ("--shutdown.settle_ms", "0", "--shutdown.telemetry_flush_ms", str(self.FLUSH_MS))
            servers = [stack.enter_context(running(*flags, command=FAKE, **env)) for env in ({}, exporting)]
            plain, dead = self.medians_ms(servers)
            begun = time.monotonic()
            assert servers[1].stop() == 0
            stopped_s = time.monotonic() - begun

        # Tracing every call costs some tens of microseconds, which a busy machine stretches as it does the call itself;
        # waiting for a collector would be seconds.
        assert dead < 2 * plain + 2
        assert stopped_s < self.FLUSH_MS / 1000 + 1.5

    def medians_ms(self, servers: list[ServerProcess]) -> list[float]:
        """Median time of 300 calls to each, in turns."""
        times: list[list[float]] = [[] for _ in servers]
        with ExitStack() as stack:
            channels = [stack.enter_context(grpc.insecure_channel(server.address)) for server in servers]
            stubs = [EmbeddingServiceStub(channel) for channel in channels]
            for _ in range(300):
                for stub, took in zip(stubs, times, strict=True):
                    begun = time.monotonic()
                    stub.Embed(pb.EmbedRequest(texts=["hello"]))
                    took.append((time.monotonic() - begun) * 1000)
        return [median(took) for took in times]
