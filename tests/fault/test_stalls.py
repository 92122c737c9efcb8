"""Row 16, and row 27 with a watchdog: a device that stalls or hangs, in the real process."""

from __future__ import annotations

import asyncio
import signal
import time

import grpc
import grpc.aio
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from embedserve.v1 import embedding_pb2 as pb
from embedserve.v1.embedding_pb2_grpc import EmbeddingServiceStub
from tests.fault.fault_server import SERVER
from tests.fault.figures import get, load, settled, wait_for
from tests.integration.server.calls import expected, values
from tests.integration.server.process import QUICK, ServerProcess, running

pytestmark = pytest.mark.process

STALL = "*"
"""A pass of two seconds."""
HANG = "="
"""A pass that never ends."""
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


async def on_device(server: ServerProcess) -> None:
    await asyncio.to_thread(server.wait, lambda: load(server)["running_items"], "a running pass")


class TestStall:
    """A pass that takes long, and ends."""

    async def test_not_serving_within_the_limit_what_waits_expires_and_all_is_well_again(self) -> None:
        flags = ("--health.stall_ms", "400", "--health.hang_ms", "30000", "--admission.policies", "none")
        with running(*QUICK, *flags, command=SERVER) as server:
            async with grpc.aio.insecure_channel(server.address) as channel:
                stub, health = EmbeddingServiceStub(channel), health_pb2_grpc.HealthStub(channel)
                watch = health.Watch(health_pb2.HealthCheckRequest())
                told = [(await watch.read()).status]
                begun = time.monotonic()
                stalled = asyncio.ensure_future(stub.Embed(pb.EmbedRequest(texts=[STALL]), timeout=20))
                await on_device(server)
                waiting = [
                    asyncio.ensure_future(stub.Embed(pb.EmbedRequest(texts=["hello"]), timeout=0.3)) for _ in range(10)
                ]
                expired = await asyncio.gather(*waiting, return_exceptions=True)
                told.append((await watch.read()).status)
                noticed = time.monotonic() - begun
                ready_then = (await asyncio.to_thread(get, server.operations + "/readyz"))[0]
                alive_then = (await asyncio.to_thread(get, server.operations + "/livez"))[0]
                assert len((await stalled).embeddings) == 1
                told.append((await watch.read()).status)
                answer = await stub.Embed(pb.EmbedRequest(texts=["hello world"]), timeout=5)
            await asyncio.to_thread(settled, server)
            assert get(server.operations + "/readyz")[0] == 200
            assert server.stop() == 0

        assert told == [SERVING, NOT_SERVING, SERVING]
        assert noticed < 1.9, "before the pass has ended"
        assert (ready_then, alive_then) == (503, 200)
        assert {error.code() for error in expired} <= {
            grpc.StatusCode.DEADLINE_EXCEEDED,
            grpc.StatusCode.RESOURCE_EXHAUSTED,
        }
        assert np.array_equal(values(answer.embeddings[0]), expected("hello world"))


class TestHang:
    """A pass that never ends."""

    async def test_everybody_is_told_and_the_exit_is_70(self) -> None:
        flags = ("--health.stall_ms", "200", "--health.hang_ms", "800")
        with running(*QUICK, *flags, command=SERVER) as server:
            async with grpc.aio.insecure_channel(server.address) as channel:
                stub = EmbeddingServiceStub(channel)
                begun = time.monotonic()
                calls = [asyncio.ensure_future(stub.Embed(pb.EmbedRequest(texts=[HANG]), timeout=20)) for _ in range(3)]
                await on_device(server)
                calls += [
                    asyncio.ensure_future(stub.Embed(pb.EmbedRequest(texts=["hello"]), timeout=20)) for _ in range(3)
                ]
                ended = await asyncio.gather(*calls, return_exceptions=True)
            code = await asyncio.to_thread(server.ended)
            took = time.monotonic() - begun

        # INTERNAL for who was with the device; who came when it did not serve any more may be turned away.
        assert {error.code() for error in ended} <= {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE}
        assert grpc.StatusCode.INTERNAL in {error.code() for error in ended}
        assert code == 70
        assert took < 5
        assert any(line["event"] == "failed" for line in server.log)


class TestOwnAbsence:
    """A process that was stopped must not take its own absence for a device that hangs."""

    async def test_sigstop_in_a_pass_for_longer_than_the_hang_limit(self) -> None:
        flags = ("--health.stall_ms", "300", "--health.hang_ms", "1500")
        with running(*QUICK, *flags, command=SERVER, PASS_MS="100") as server:
            async with grpc.aio.insecure_channel(server.address) as channel:
                stub = EmbeddingServiceStub(channel)
                call = asyncio.ensure_future(stub.Embed(pb.EmbedRequest(texts=["hello world"]), timeout=20))
                await on_device(server)
                server.process.send_signal(signal.SIGSTOP)
                try:
                    await asyncio.sleep(2.5)  # the fault itself
                finally:
                    server.process.send_signal(signal.SIGCONT)
                answer = await call
                again = await stub.Embed(pb.EmbedRequest(texts=["hello world"]), timeout=5)
            await asyncio.to_thread(wait_for, lambda: get(server.operations + "/readyz")[0] == 200, "readiness")
            assert server.process.poll() is None
            assert server.stop() == 0

        assert np.array_equal(values(answer.embeddings[0]), expected("hello world"))
        assert list(again.embeddings[0].values) == list(answer.embeddings[0].values)
