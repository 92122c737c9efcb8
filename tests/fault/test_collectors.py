"""Rows 46, 47 and 50: collectors that are slow, broken, gone or back; and that every call is told of exactly once."""

from __future__ import annotations

import asyncio
import collections
import http.server
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import grpc.aio
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as trace_pb2
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as trace_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from embedserve.v1 import embedding_pb2 as pb
from embedserve.v1.embedding_pb2_grpc import EmbeddingServiceStub
from tests.fault.fault_server import SERVER
from tests.fault.figures import figures, quantile, settled, wait_for
from tests.fault.words import WORDS
from tests.integration.server.process import QUICK, ServerProcess, running
from tests.integration.telemetry.collector import free_port

pytestmark = pytest.mark.process

FLUSH_MS = 500
SERVICE = "embedserve.v1.EmbeddingService"
EXPORTING = {
    "OTEL_TRACES_EXPORTER": "otlp",
    "OTEL_METRICS_EXPORTER": "none",
    "OTEL_TRACES_SAMPLER": "always_on",
    "OTEL_BSP_SCHEDULE_DELAY": "20",
    "OTEL_EXPORTER_OTLP_TIMEOUT": "1",
}


class Spans(trace_grpc.TraceServiceServicer):
    """Keeps spans; ``before`` runs first and may wait or raise."""

    def __init__(self) -> None:
        self.before: Callable[[], None] = lambda: None
        self.kept: list[Span] = []

    def Export(self, request: trace_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext) -> object:
        self.before()
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.kept.extend(scope.spans)
        return trace_pb2.ExportTraceServiceResponse()


@contextmanager
def collecting(spans: Spans, port: int = 0) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(2))
    trace_grpc.add_TraceServiceServicer_to_server(spans, server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield f"http://127.0.0.1:{bound}"
    finally:
        server.stop(None)


class _Says500(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_error(500)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@contextmanager
def broken(kind: str) -> Iterator[dict[str, str]]:
    """A collector of that kind, as the variables that lead to it."""
    if kind == "500s":
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Says500) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            try:
                endpoint = f"http://127.0.0.1:{server.server_address[1]}"
                yield {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}
            finally:
                server.shutdown()
                thread.join()
        return
    spans, over = Spans(), threading.Event()
    spans.before = (lambda: over.wait(0.4)) if kind == "slow" else _refuse
    with collecting(spans) as endpoint:
        yield {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
        over.set()


def _refuse() -> None:
    raise RuntimeError("the collector's own disk is full")


def times_ms(server: ServerProcess, calls: int) -> list[float]:
    took = []
    with grpc.insecure_channel(server.address) as channel:
        stub = EmbeddingServiceStub(channel)
        for _ in range(calls):
            begun = time.monotonic()
            stub.Embed(pb.EmbedRequest(texts=["hello"]), timeout=5)
            took.append((time.monotonic() - begun) * 1e3)
    return took


@pytest.fixture(scope="module")
def without() -> float:
    """Milliseconds that a call takes where nothing is traced."""
    with running(*QUICK, command=SERVER, OTEL_TRACES_EXPORTER="none") as plain:
        median = quantile(times_ms(plain, 300), 0.5)
        assert plain.stop() == 0
    return median


class TestBrokenCollectors:
    """They cost spans, which are counted, and neither calls nor the end."""

    @pytest.mark.parametrize("kind", ["slow", "failing", "500s"])
    def test_calls_are_as_fast_losses_are_counted_and_the_end_is_bounded(self, kind: str, without: float) -> None:
        flags = ("--shutdown.settle_ms", "0", "--shutdown.telemetry_flush_ms", str(FLUSH_MS))
        with broken(kind) as where, running(
            *flags, command=SERVER, **EXPORTING, **where, OTEL_BSP_MAX_QUEUE_SIZE="64"
        ) as server:  # fmt: skip
            took = quantile(times_ms(server, 600), 0.5)
            lost = wait_for(
                lambda: {
                    k: v
                    for k, v in figures(server).by("embedserve_telemetry_spans_total", "outcome").items()
                    if k != "exported"
                },
                "a loss that is counted",
            )
            begun = time.monotonic()
            assert server.stop() == 0
            stopped_s = time.monotonic() - begun

        assert took < without * 3 + 2, "ms; waiting for a collector would be hundreds"
        assert sum(lost.values()) > 0
        assert stopped_s < FLUSH_MS / 1000 + 1.5

    def test_one_that_comes_back_gets_spans_again(self) -> None:
        port, spans = free_port(), Spans()
        where = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
        with running(*QUICK, command=SERVER, **EXPORTING, **where) as server:
            times_ms(server, 20)
            wait_for(
                lambda: figures(server).total("embedserve_telemetry_spans_total", outcome="failed") > 0, "a loss", 20
            )
            with collecting(spans, port):
                wait_for(lambda: times_ms(server, 5) and spans.kept, "spans", 20)
            assert server.stop() == 0

        assert any(span.name == f"{SERVICE}/Embed" for span in spans.kept)


class TestConservation:
    """Each call has one span and one metric point, with the same status, whatever became of it."""

    async def test_calls_of_every_fate(self) -> None:
        rng, spans = random.Random(41), Spans()
        fates: collections.Counter[str] = collections.Counter()
        with (
            collecting(spans) as endpoint,
            running(
                *QUICK, "--scheduling.max_batch_tokens", "512", "--limits.max_requests_in_flight", "40",
                "--shutdown.telemetry_flush_ms", "10000", command=SERVER, PASS_MS="10", MEMORY_TOKENS="200",
                OTEL_EXPORTER_OTLP_ENDPOINT=endpoint, OTEL_EXPORTER_OTLP_PROTOCOL="grpc", **EXPORTING,
            ) as server,
        ):  # fmt: skip
            async with grpc.aio.insecure_channel(server.address) as channel:
                stub = EmbeddingServiceStub(channel)

                async def one(fate: str) -> None:
                    await asyncio.sleep(rng.random() * 0.5)  # spread, or all is cancelled before it is sent
                    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 10))) for _ in range(rng.randint(1, 8))]
                    request = pb.EmbedRequest(texts=texts)
                    try:
                        match fate:
                            case "invalid":
                                await stub.Embed(pb.EmbedRequest(texts=["", *texts]))
                            case "poison":
                                await stub.Embed(pb.EmbedRequest(texts=[*texts, "poison"]))
                            case "expires":
                                await stub.Embed(request, timeout=0.02)
                            case "cancelled":
                                call = stub.Embed(request)
                                await asyncio.sleep(0.005 + rng.random() * 0.02)
                                call.cancel()
                                await call
                            case "stream":
                                async for _ in stub.EmbedStream(pb.EmbedStreamRequest(texts=[*texts, "", "poison"])):
                                    pass
                            case _:
                                await stub.Embed(request)
                        fates["OK"] += 1
                    except grpc.aio.AioRpcError as error:
                        fates[error.code().name] += 1
                    except asyncio.CancelledError:
                        fates["CANCELLED"] += 1

                kinds = ["ok", "ok", "invalid", "poison", "expires", "cancelled", "stream"]
                await asyncio.gather(*(one(rng.choice(kinds)) for _ in range(400)))
            counted = (await asyncio.to_thread(settled, server)).by(
                "rpc_server_call_duration_seconds_count", "rpc_response_status_code"
            )
            ran_out = figures(server).total("embedserve_batch_duration_seconds_count", outcome="out_of_memory")
            assert await asyncio.to_thread(server.stop) == 0

        calls = [s for s in spans.kept if s.name.startswith(SERVICE)]
        told = collections.Counter(
            a.value.string_value for s in calls for a in s.attributes if a.key == "rpc.response.status_code"
        )
        assert len({span.span_id for span in calls}) == len(calls), "no call twice"
        assert all(span.end_time_unix_nano >= span.start_time_unix_nano > 0 for span in calls)
        assert told == counted
        assert told.keys() >= {"OK", "INVALID_ARGUMENT", "INTERNAL", "RESOURCE_EXHAUSTED", "CANCELLED"}
        assert ran_out > 0, "no batch was split"
        # What is cancelled or expires before its headers are sent never reaches the server.
        assert 400 - fates["CANCELLED"] - fates["DEADLINE_EXCEEDED"] <= len(calls) <= 400
        for code in ("OK", "INVALID_ARGUMENT", "INTERNAL"):
            assert told[code] >= fates[code]
