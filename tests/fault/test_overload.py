"""Rows 20, 33 and 37: three times what the device can do, and for long. Goodput, memory and probes stay as they are."""

from __future__ import annotations

import asyncio
import collections
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from embedserve.v1 import embedding_pb2 as pb
from embedserve.v1.embedding_pb2_grpc import EmbeddingServiceStub
from tests.fault.fault_server import SERVER
from tests.fault.figures import get, quantile, rss_bytes, settled, slope
from tests.fault.words import WORDS
from tests.integration.server.process import QUICK, ServerProcess, running

pytestmark = pytest.mark.process

MIB = 1 << 20
TEXTS = ["hello world says quiet stone to a river"] * 10
"""Some 25 tokens each."""
DEADLINE_S = 2.0


class Outcomes:
    """How calls ended, and when."""

    def __init__(self) -> None:
        self.by_code: collections.Counter[str] = collections.Counter()
        self.good: list[float] = []
        self.pushbacks: list[str | None] = []

    async def call(self, stub: EmbeddingServiceStub) -> None:
        try:
            await stub.Embed(pb.EmbedRequest(texts=TEXTS), timeout=DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            self.by_code[error.code().name] += 1
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                self.pushbacks.append(dict(error.trailing_metadata() or ()).get("grpc-retry-pushback-ms"))
        else:
            self.by_code["OK"] += 1
            self.good.append(time.monotonic())

    def goodput(self, begun: float) -> float:
        """Good calls a second, from ``begun`` to the last one's end.

        Not within a window: callers that share batches end together, so a window's edge moves the count by a batch.
        """
        return len(self.good) / (max(self.good) - begun)


async def closed_loop(stub: EmbeddingServiceStub, seconds: float, width: int = 32) -> float:
    """The most that the server does: calls a second with ``width`` callers that each wait for their answer."""
    outcomes, begun = Outcomes(), time.monotonic()
    ends = begun + seconds

    async def caller() -> None:
        while time.monotonic() < ends:
            await outcomes.call(stub)

    await asyncio.gather(*(caller() for _ in range(width)))
    assert outcomes.by_code.keys() == {"OK"}
    return outcomes.goodput(begun)


async def open_loop(stub: EmbeddingServiceStub, rate: float, seconds: float) -> Outcomes:
    """``rate`` calls a second, whatever becomes of them."""
    outcomes, calls, begun = Outcomes(), [], time.monotonic()
    while time.monotonic() < begun + seconds:
        for _ in range(int((time.monotonic() - begun) * rate) - len(calls)):
            calls.append(asyncio.ensure_future(outcomes.call(stub)))
        await asyncio.sleep(0.002)
    await asyncio.gather(*calls)
    return outcomes


@asynccontextmanager
async def probing(server: ServerProcess) -> AsyncIterator[list[float]]:
    """Health checks and liveness probes 25 times a second; gives how long each took, in ms."""
    took: list[float] = []

    async def probe() -> None:
        async with grpc.aio.insecure_channel(
            server.address, options=[("grpc.use_local_subchannel_pool", 1)]
        ) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            while True:
                begun = time.monotonic()
                answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=5)
                took.append((time.monotonic() - begun) * 1e3)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
                if len(took) % 10 == 0:
                    assert (await asyncio.to_thread(get, server.operations + "/livez"))[0] == 200
                await asyncio.sleep(0.04)

    probe_task = asyncio.ensure_future(probe())
    try:
        yield took
        assert not probe_task.done(), probe_task.result()
    finally:
        probe_task.cancel()
        with suppress(asyncio.CancelledError):
            await probe_task


class TestThreeTimesTheCapacity:
    """An open loop at three times what the device does."""

    SECONDS = 5.0

    async def test_goodput_stays_refusals_have_hints_and_memory_is_flat(self) -> None:
        # 60 us a token and some 250 tokens a call: 15 ms a call, far more than the event loop needs for it.
        with running(*QUICK, "--admission.throughput.max_drain_ms", "1000", command=SERVER, TOKEN_US="60") as server:
            async with grpc.aio.insecure_channel(server.address) as channel:
                stub = EmbeddingServiceStub(channel)
                peak = await closed_loop(stub, 2.0)
                before = rss_bytes(server.pid)
                async with probing(server) as health_ms:
                    begun = time.monotonic()
                    outcomes = await open_loop(stub, 3 * peak, self.SECONDS)
                grown = rss_bytes(server.pid) - before
                recovered = await closed_loop(stub, 1.0)
            found = await asyncio.to_thread(settled, server)
            assert server.stop() == 0

        goodput = outcomes.goodput(begun)
        print(  # noqa: T201
            f"peak {peak:.0f}/s, goodput {goodput:.0f}/s ({goodput / peak:.2f}), after it {recovered:.0f}/s, "
            f"{dict(outcomes.by_code)}, "
            f"health p50 {quantile(health_ms, 0.5):.1f} p99 {quantile(health_ms, 0.99):.1f} ms, {grown / MIB:.1f} MiB"
        )
        assert outcomes.by_code.total() > 2.5 * peak * self.SECONDS, "the load was not what it should be"
        assert goodput >= 0.85 * peak
        assert outcomes.by_code.keys() <= {"OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
        assert outcomes.by_code["DEADLINE_EXCEEDED"] <= 0.01 * outcomes.by_code.total()
        assert all(hint is not None and int(hint) >= 0 for hint in outcomes.pushbacks)
        assert quantile(health_ms, 0.99) < 250
        assert grown < 40 * MIB
        assert recovered >= 0.8 * peak
        assert found.total("embedserve_items_settled_total", verdict="expired") <= 0.02 * 10 * outcomes.by_code.total()

    @pytest.mark.parametrize(("hold_ms", "limit_ms"), [(10, 1000), (200, 5000)])
    async def test_probes_are_answered_beside_a_model_that_holds_the_interpreter(
        self, hold_ms: int, limit_ms: int
    ) -> None:
        """The event loop has a turn between two passes only, and a call needs several turns. None fails."""
        with running(*QUICK, command=SERVER, GIL_MS=str(hold_ms)) as server:
            async with grpc.aio.insecure_channel(server.address) as channel, probing(server) as health_ms:
                outcomes = await open_loop(EmbeddingServiceStub(channel), 30, 3.0)
            assert server.stop() == 0

        p50, p99 = quantile(health_ms, 0.5), quantile(health_ms, 0.99)
        print(f"{dict(outcomes.by_code)}, health p50 {p50:.1f} p99 {p99:.1f} ms")  # noqa: T201
        assert outcomes.by_code["OK"] > 0
        assert p99 < limit_ms


class TestForLong:
    """Twelve thousand calls of all kinds: what one leaves behind would show."""

    CALLS, SAMPLES = 12_000, 12

    async def test_memory_does_not_creep(self) -> None:
        rng = random.Random(31)

        async def one(stub: EmbeddingServiceStub) -> None:
            texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(rng.choice([1, 1, 1, 1, 6]))]
            kind = rng.random()
            with suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
                if kind < 0.7:
                    await stub.Embed(pb.EmbedRequest(texts=texts), timeout=10)
                elif kind < 0.8:
                    async for _ in stub.EmbedStream(pb.EmbedStreamRequest(texts=texts), timeout=10):
                        pass
                elif kind < 0.85:
                    await stub.Embed(pb.EmbedRequest(texts=[*texts, "poison"]), timeout=10)
                elif kind < 0.9:
                    await stub.Embed(pb.EmbedRequest(texts=["", *texts], dimensions=99), timeout=10)
                elif kind < 0.95:
                    call = stub.Embed(pb.EmbedRequest(texts=texts), timeout=10)
                    await asyncio.sleep(0)
                    call.cancel()
                else:
                    await stub.Embed(pb.EmbedRequest(texts=texts), timeout=0.002)

        memory = []
        with running(*QUICK, command=SERVER) as server:
            async with grpc.aio.insecure_channel(server.address) as channel:
                stub = EmbeddingServiceStub(channel)
                for _ in range(self.SAMPLES):
                    gate = asyncio.Semaphore(64)

                    async def gated(gate: asyncio.Semaphore = gate) -> None:
                        async with gate:
                            await one(stub)

                    await asyncio.gather(*(gated() for _ in range(self.CALLS // self.SAMPLES)))
                    memory.append(rss_bytes(server.pid) / MIB)
            await asyncio.to_thread(settled, server)
            assert server.stop() == 0

        warm = memory[self.SAMPLES // 4 :]
        per_sample = slope(warm)
        print(f"{memory[0]:.1f} -> {memory[-1]:.1f} MiB, {per_sample * 1024:.0f} KiB per 1000 calls")  # noqa: T201
        # 100 bytes a call would be 0.1 MiB a sample; the allocator's own steps are as large.
        assert per_sample < 0.3
