"""gRPC interop: metadata, statuses, unknown names, cancellation and deadlines, by the specification's case names."""

from __future__ import annotations

import asyncio
import collections
import os
import time

import grpc
import pytest
from google.rpc import status_pb2

from embedserve.testing.server import InProcessServer, serving
from embedserve.v1 import embedding_pb2 as pb
from tests.conformance.conftest import sleeping
from tests.conformance.frames import EMBED, connected, data, grpc_message
from tests.integration.server.calls import SERVICE, expected, failure, read, until, values
from tests.integration.server.process import FAKE, QUICK, running

HELLO = pb.EmbedRequest(texts=["hello world"])


class TestCustomMetadata:
    ECHOES = (
        ("x-grpc-test-echo-initial", "test_initial_metadata_value"),
        ("x-grpc-test-echo-trailing-bin", b"\xab\xab\xab"),
    )
    """The specification's; ours is no echo server, so they must come to no harm, and our own come back."""

    async def test_unary_and_streaming(self, server: InProcessServer) -> None:
        answer = await server.stub.Embed(HELLO, metadata=self.ECHOES)
        streamed = await read(server.stub.EmbedStream(pb.EmbedStreamRequest(texts=["a"]), metadata=self.ECHOES))

        assert (values(answer.embeddings[0]) == expected("hello world")).all()
        assert streamed.vectors

    async def test_binary_metadata_comes_back_as_bytes(self, server: InProcessServer) -> None:
        """``grpc-status-details-bin`` holds any bytes: it is base64 on the wire and bytes at both ends."""
        error = await failure(server.stub.Embed(pb.EmbedRequest(model="\u00ff\u263a", texts=["a"])))

        raw = error.trailers["grpc-status-details-bin"]
        assert isinstance(raw, bytes)
        assert status_pb2.Status.FromString(raw).code == grpc.StatusCode.NOT_FOUND.value[0]

    @pytest.mark.process
    def test_ascii_metadata_of_ours_comes_back_on_both_kinds_of_call(self) -> None:
        """``x-trace-id`` is that of the caller's sampled ``traceparent``, on success and on failure."""
        trace_id = os.urandom(16).hex()
        metadata = (("traceparent", f"00-{trace_id}-{'ab' * 8}-01"), *self.ECHOES)
        endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_METRICS_EXPORTER": "none"}
        with running(*QUICK, command=FAKE, **endpoint) as process, grpc.insecure_channel(process.address) as channel:
            stub = process.stub(channel)
            _, unary = stub.Embed.with_call(HELLO, metadata=metadata)
            streaming = stub.EmbedStream(pb.EmbedStreamRequest(texts=["a"]), metadata=metadata)
            assert list(streaming)
            with pytest.raises(grpc.RpcError) as failed:
                stub.Embed(pb.EmbedRequest(), metadata=metadata)

            for call in (unary, streaming, failed.value):
                assert dict(call.trailing_metadata())["x-trace-id"] == trace_id


class TestStatus:
    async def test_status_code_and_message(self, server: InProcessServer) -> None:
        for call in (
            server.stub.Embed(pb.EmbedRequest(model="test status message", texts=["a"])),
            read(server.stub.EmbedStream(pb.EmbedStreamRequest(model="test status message", texts=["a"]))),
        ):
            error = await failure(call)
            assert error.code is grpc.StatusCode.NOT_FOUND
            assert error.message == "model 'test status message' is not served here; served: fake/model"

    @pytest.mark.parametrize(
        "name",
        [
            "\t\ntest with whitespace\r\nand Unicode BMP ☺ and non-BMP 😈\t\n",
            " leading and trailing ",
            "100 % of %41",
            "\x00\x7f\u0080",
            "\u202e right to left",
        ],
    )
    async def test_special_status_message(self, server: InProcessServer, name: str) -> None:
        """What is percent-encoded in ``grpc-message`` is at the client what ``google.rpc.Status`` holds, unencoded."""
        error = await failure(server.stub.Embed(pb.EmbedRequest(model=name, texts=["a"])))

        assert error.message == f"model {name!r} is not served here; served: fake/model"
        assert status_pb2.Status.FromString(error.trailers["grpc-status-details-bin"]).message == error.message

    async def test_special_status_message_on_the_wire(self, server: InProcessServer) -> None:
        """Only bytes from space to tilde, percent itself encoded."""
        request = pb.EmbedRequest(model="50 % ☺", texts=["a"]).SerializeToString()
        async with connected(server.address) as raw:
            await raw.send(raw.call(1), data(1, grpc_message(request)))
            message = (await raw.trailers(1))["grpc-message"]

        assert "50 %25 %E2%98%BA" in message

    async def test_unimplemented_method(self, server: InProcessServer) -> None:
        error = await refused(server.channel.unary_unary(f"/{SERVICE}/UnimplementedCall")(b""))
        assert error is grpc.StatusCode.UNIMPLEMENTED

    async def test_unimplemented_service(self, server: InProcessServer) -> None:
        error = await refused(server.channel.unary_unary("/grpc.testing.UnimplementedService/UnimplementedCall")(b""))
        assert error is grpc.StatusCode.UNIMPLEMENTED


async def refused(call: grpc.aio.UnaryUnaryCall) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code()


class TestCancellation:
    async def test_cancel_after_begin(self) -> None:
        """At every moment from the very first: CANCELLED at the client, nothing left at the server."""
        async with sleeping() as server:
            for pause_s in (0, 0.001, 0.02):
                call = server.stub.Embed(HELLO)
                await asyncio.sleep(pause_s)
                assert call.cancel()
                assert await call.code() is grpc.StatusCode.CANCELLED
            await until(lambda: server.guard.in_flight == 0)
            assert server.engine.load().queue_depth == 0

    async def test_cancel_after_first_response(self) -> None:
        """The rest of the stream is not computed."""
        async with sleeping(**{"scheduling.max_batch_items": "4", "scheduling.batches_in_flight": "1"}) as server:
            server.plan.gate.set()
            stream = server.stub.EmbedStream(pb.EmbedStreamRequest(texts=["hello"] * 16_000))
            assert (await stream.read()).embeddings
            server.plan.gate.clear()
            stream.cancel()

            assert await stream.code() is grpc.StatusCode.CANCELLED
            server.plan.gate.set()
            await until(lambda: server.guard.in_flight == 0)
            assert server.engine.load().queue_depth == 0
            assert sum(rows for rows, _ in server.backend.passes) < 8000


class TestDeadlines:
    async def test_timeout_on_sleeping_server(self) -> None:
        async with sleeping() as server:
            for call in (
                server.stub.Embed(HELLO, timeout=0.05),
                read(server.stub.EmbedStream(pb.EmbedStreamRequest(texts=["a"]), timeout=0.05)),
            ):
                begun = time.monotonic()
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                assert time.monotonic() - begun < 2

    @pytest.mark.parametrize("header", ["60m", "60000u", "60000000n"])
    async def test_a_deadline_is_propagated_in_every_unit(self, header: str) -> None:
        """The server ends the call itself, whether the client still listens or not."""
        async with sleeping() as server, connected(server.address) as raw:
            begun = time.monotonic()
            await raw.send(
                raw.call(1, EMBED, [("grpc-timeout", header)]), data(1, grpc_message(HELLO.SerializeToString()))
            )
            await raw.until(lambda f: f.stream_id == 1)
            await until(lambda: server.guard.in_flight == 0)

            assert 0.05 < time.monotonic() - begun < 2

    @pytest.mark.parametrize("streams", [4096, 500])
    async def test_multiple_thousand_simultaneous_calls_time_out_on_the_same_channel(self, streams: int) -> None:
        """Each has its one status in time, and the channel works afterwards.

        Where a connection carries fewer at once, those that come up when the first ones expire may be refused by Core
        (REFUSED_STREAM, which clients may retry) instead of expiring themselves; one that comes too late to be done in
        time is refused by our own admission.
        """
        limits = {"server.max_concurrent_streams": str(streams), "admission.policies": ""}
        async with sleeping(**limits) as server:
            begun = time.monotonic()
            calls = [server.stub.Embed(HELLO, timeout=1.5) for _ in range(2000)]
            codes = collections.Counter([await call.code() for call in calls])

            by_core = 0 if streams >= len(calls) else codes.pop(grpc.StatusCode.UNAVAILABLE, 0)
            too_late = codes.pop(grpc.StatusCode.RESOURCE_EXHAUSTED, 0)
            assert codes == {grpc.StatusCode.DEADLINE_EXCEEDED: 2000 - by_core - too_late}
            assert codes.total() >= 500
            assert time.monotonic() - begun < 5
            await until(lambda: server.guard.in_flight == 0)
            assert server.engine.load().queue_depth == 0
            server.plan.gate.set()
            answer = await server.stub.Embed(HELLO)
            assert (values(answer.embeddings[0]) == expected("hello world")).all()


class TestHeaderSize:
    """63K of X in one header."""

    X = "X" * (63 << 10)

    async def test_over_the_limit(self, server: InProcessServer) -> None:
        """RESOURCE_EXHAUSTED by the transport; the next call on the same channel is served."""
        assert (
            await refused(server.stub.Embed(HELLO, metadata=(("x-fill", self.X),)))
            is grpc.StatusCode.RESOURCE_EXHAUSTED
        )
        assert (await server.stub.Embed(HELLO)).embeddings

    async def test_under_the_limit(self) -> None:
        async with serving(settings={"server.max_metadata_bytes": str(66 << 10)}) as server:
            assert (await server.stub.Embed(HELLO, metadata=(("x-fill", self.X),))).embeddings

    @pytest.mark.parametrize(("size", "served"), [(15 << 10, True), (17 << 10, False)])
    async def test_both_sides_of_the_default(self, server: InProcessServer, size: int, served: bool) -> None:
        call = server.stub.Embed(HELLO, metadata=(("x-fill", "X" * size),))
        assert (await call.code() is grpc.StatusCode.OK) is served
