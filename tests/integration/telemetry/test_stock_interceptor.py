"""Why we do not use the server interceptor of ``opentelemetry-instrumentation-grpc``: what it does today, reproduced.

These tests assert behaviour that is wrong. When one of them fails, upstream has mended that fault: drop the test and
name the release that mended it in ``telemetry/tracing.py``. Once none is left, think again whether our tracer should
build on the stock interceptor, and whether ``setup_telemetry`` still has to take the zero-code patch off.

Issues: open-telemetry/opentelemetry-python-contrib#3066 (handlers that are coroutines, as health Watch), #2357.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import grpc.aio
import pytest
from google.rpc import code_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from opentelemetry.instrumentation.grpc import aio_server_interceptor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

Handler = Callable[[bytes, grpc.aio.ServicerContext], Awaitable[bytes]]


class Server:
    """A server with the stock interceptor, health, and one method that a test can set."""

    def __init__(self, channel: grpc.aio.Channel, exporter: InMemorySpanExporter) -> None:
        self.channel = channel
        self._exporter = exporter
        self.handler: Handler | None = None

    async def call(self) -> grpc.StatusCode:
        """The status that the client sees of the method."""
        try:
            await self.channel.unary_unary("/t.T/Call")(b"", timeout=10)
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK

    def span(self) -> ReadableSpan:
        """The one span that was recorded."""
        (span,) = self._exporter.get_finished_spans()
        return span


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    running = grpc.aio.server(interceptors=[aio_server_interceptor(tracer_provider=provider)])
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), running)

    async def call(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        assert made.handler is not None
        return await made.handler(request, context)

    handlers = {"Call": grpc.unary_unary_rpc_method_handler(call)}
    running.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.T", handlers),))
    port = running.add_insecure_port("127.0.0.1:0")
    await running.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        made = Server(channel, exporter)
        yield made
    await running.stop(None)


class TestStockInterceptor:
    async def test_it_breaks_the_watch_of_the_stock_health_service(self, server: Server) -> None:
        watch = health_pb2_grpc.HealthStub(server.channel).Watch(health_pb2.HealthCheckRequest(), timeout=10)

        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await watch.read()

        assert grpc.StatusCode.UNKNOWN is raised.value.code()
        assert "__aiter__" in str(raised.value.details())

    async def test_it_records_a_rich_error_as_ok(self, server: Server) -> None:
        async def handler(_request: bytes, context: grpc.aio.ServicerContext) -> bytes:
            rich = status_pb2.Status(code=code_pb2.UNAVAILABLE, message="later")
            await context.abort_with_status(rpc_status.to_status(rich))
            raise AssertionError

        server.handler = handler

        assert grpc.StatusCode.UNAVAILABLE is await server.call()
        span = server.span()
        assert (span.attributes["rpc.grpc.status_code"], span.status.status_code) == (0, StatusCode.UNSET)

    async def test_it_records_an_exception_as_ok(self, server: Server) -> None:
        async def handler(_request: bytes, _context: grpc.aio.ServicerContext) -> bytes:
            raise ValueError("ours")

        server.handler = handler

        assert grpc.StatusCode.UNKNOWN is await server.call()
        span = server.span()
        assert (span.attributes["rpc.grpc.status_code"], span.status.status_code) == (0, StatusCode.UNSET)
