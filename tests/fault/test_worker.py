"""Rows 14, 17, 18: the device's thread, or the whole process, ends. Nobody hangs, and a restart starts clean."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from embedserve.v1 import embedding_pb2 as pb
from embedserve.v1.embedding_pb2_grpc import EmbeddingServiceStub
from tests.fault.fault_server import SERVER
from tests.fault.figures import load
from tests.integration.server.process import QUICK, ServerProcess, running

pytestmark = pytest.mark.process

SLOW = "~"
"""A pass of 300 ms, so that others wait behind it."""


async def fall(server: ServerProcess, order: str) -> tuple[list[object], list[object], object, int, float]:
    """Give the order while a slow pass runs: how those with it and those behind it end, the watch, and the exit."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = EmbeddingServiceStub(channel)
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        slow = asyncio.ensure_future(stub.Embed(pb.EmbedRequest(texts=[SLOW]), timeout=20))
        await asyncio.to_thread(server.wait, lambda: _busy(server), "a running pass")
        begun = time.monotonic()
        doomed = [asyncio.ensure_future(stub.Embed(pb.EmbedRequest(texts=[order] * 2), timeout=20)) for _ in range(3)]
        # Behind the order, in a batch of their own: the batch is full.
        waiting = [
            asyncio.ensure_future(stub.Embed(pb.EmbedRequest(texts=["hello"] * 40), timeout=20)) for _ in range(3)
        ]
        ended = await asyncio.gather(*doomed, return_exceptions=True)
        others = await asyncio.gather(*waiting, return_exceptions=True)
        told = await watch.read()
        assert len((await slow).embeddings) == 1, "the pass before it was good"
        code = await asyncio.to_thread(server.ended)
    return list(ended), list(others), told, code, time.monotonic() - begun


async def _code(call: object) -> grpc.StatusCode:
    try:
        await call  # type: ignore[misc]
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def _busy(server: ServerProcess) -> bool:
    return bool(load(server)["running_items"])


SMALL = ("--scheduling.max_batch_items", "6", "--tokenizer.threads", "1")


class TestFatal:
    """What cannot be survived is told within a second to everybody who waits, and ends the process with 70."""

    @pytest.mark.parametrize(
        ("order", "reason"),
        [("%", "shape"), ("&", "device lost"), ("@", "KeyboardInterrupt")],
        ids=["a row too few", "device lost", "thread ends"],
    )
    async def test_everybody_is_told_internal_and_the_exit_is_70(self, order: str, reason: str) -> None:
        with running(*QUICK, *SMALL, command=SERVER) as server:
            ended, others, told, code, took = await fall(server, order)

        assert {error.code() for error in ended} == {grpc.StatusCode.INTERNAL}
        assert {error.code() for error in others} == {grpc.StatusCode.INTERNAL}
        for error in (*ended, *others):
            assert reason not in str(error.details()), "the client gets an id, the log the rest"
            assert "grpc-retry-pushback-ms" not in dict(error.trailing_metadata()) or (
                dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == "-1"
            )
        assert told.status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert code == 70
        assert took < 3, "300 ms of the slow pass, 1 s for the answers, and the exit"
        assert any(line["event"] == "failed" and reason in line["reason"] for line in server.log)

    async def test_nobody_on_the_way_is_told_that_it_cancelled(self) -> None:
        """Who has not begun may try elsewhere: UNAVAILABLE. CANCELLED would be taken for the caller's own doing."""
        statuses: set[grpc.StatusCode] = set()
        with running(*QUICK, "--admission.policies", "none", command=SERVER) as server:
            async with grpc.aio.insecure_channel(server.address, options=[("grpc.enable_retries", 0)]) as channel:
                stub = EmbeddingServiceStub(channel)

                async def caller() -> None:
                    while server.process.poll() is None:
                        try:
                            await stub.Embed(pb.EmbedRequest(texts=["hello"]), timeout=20)
                        except grpc.aio.AioRpcError as error:
                            statuses.add(error.code())
                            await asyncio.sleep(0.1)  # as a client with a retry policy does, at least

                callers = [asyncio.ensure_future(caller()) for _ in range(24)]
                await asyncio.to_thread(server.wait, lambda: _busy(server), "a running pass")
                statuses.add(await _code(stub.Embed(pb.EmbedRequest(texts=["&"]), timeout=20)))
                code = await asyncio.to_thread(server.ended)
                await asyncio.gather(*callers)

        assert grpc.StatusCode.INTERNAL in statuses
        assert statuses <= {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE}
        assert code == 70


class TestNativeDeath:
    """An abort or a segmentation fault takes the process; its clients see a closed socket, its port is free."""

    @pytest.mark.parametrize(("order", "number"), [("!", signal.SIGABRT), ("$", signal.SIGSEGV)])
    async def test_clients_are_told_unavailable_and_the_same_port_serves_again(
        self, order: str, number: signal.Signals
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        options = (*QUICK, "--server.address", address)
        with running(*options, command=SERVER) as server:
            async with grpc.aio.insecure_channel(address) as channel:
                stub = EmbeddingServiceStub(channel)
                before = await stub.Embed(pb.EmbedRequest(texts=["hello world"]))
                slow = asyncio.ensure_future(stub.Embed(pb.EmbedRequest(texts=[SLOW]), timeout=20))
                await asyncio.to_thread(server.wait, lambda: _busy(server), "a running pass")
                calls = [stub.Embed(pb.EmbedRequest(texts=[order]), timeout=20) for _ in range(4)]
                stream = stub.EmbedStream(pb.EmbedStreamRequest(texts=["hello"] * 10), timeout=20)
                outcomes = await asyncio.gather(slow, *calls, stream.read(), return_exceptions=True)
                code = await asyncio.to_thread(server.ended)

                with running(*options, command=SERVER) as again:
                    after = await stub.Embed(pb.EmbedRequest(texts=["hello world"]), wait_for_ready=True, timeout=20)
                    assert await asyncio.to_thread(again.stop) == 0

        assert code == -number
        statuses = {o.code() for o in outcomes if isinstance(o, grpc.aio.AioRpcError)}
        assert statuses == {grpc.StatusCode.UNAVAILABLE}
        assert list(before.embeddings[0].values) == list(after.embeddings[0].values)

    def test_a_socket_file_that_is_left_is_no_obstacle(self, tmp_path: Path) -> None:
        address = f"unix:{tmp_path / 'embedserve.sock'}"
        with running(*QUICK, "--server.address", address, command=SERVER) as server:
            with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as gone:
                EmbeddingServiceStub(channel).Embed(pb.EmbedRequest(texts=["$"]), timeout=20)
            assert server.ended() == -signal.SIGSEGV
        assert gone.value.code() is grpc.StatusCode.UNAVAILABLE
        assert (tmp_path / "embedserve.sock").exists()

        with running(*QUICK, "--server.address", address, command=SERVER) as again:
            with grpc.insecure_channel(address) as channel:
                answer = EmbeddingServiceStub(channel).Embed(pb.EmbedRequest(texts=["hello"]), timeout=20)
            assert again.stop() == 0
        assert len(answer.embeddings) == 1
