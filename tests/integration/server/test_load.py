"""GetLoad says the truth: before an overload, within it and after it, whatever refuses."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from embedserve.testing import FaultPlan, FaultyBackend
from embedserve.testing.server import InProcessServer, serving
from embedserve.v1 import embedding_pb2 as pb
from tests.integration.server.calls import failure, until

HELLO = pb.EmbedRequest(texts=["hello"])


async def state(server: InProcessServer) -> str:
    load = await server.stub.GetLoad(pb.GetLoadRequest())
    word = pb.LoadState.Name(load.state).removeprefix("LOAD_STATE_").lower()
    assert load.accepting_requests == (word in ("healthy", "degraded"))
    return word


class Paced(FaultyBackend):
    """5 ms a pass, once its gate lets it."""

    def __init__(self) -> None:
        super().__init__(FaultPlan())
        self._pass_ns = lambda _batch: 5_000_000


POLICIES = {
    "none": {"scheduling.max_queue_items": "64", "limits.max_texts": "64"},
    "throughput": {"admission.throughput.max_drain_ms": "100"},
    "latency_p95": {
        "admission.latency_p95.slo_ms": "100",
        "admission.latency_p95.soft_ms": "20",
        "admission.latency_p95.hard_ms": "50",
    },
}


class TestOverload:
    @pytest.mark.parametrize("policies", POLICIES)
    async def test_it_is_told_while_it_lasts_and_no_longer(self, policies: str) -> None:
        """An idle server is healthy at once, though nobody has asked its policies anything since."""
        settings = {"scheduling.max_batch_items": "4", "admission.policies": policies, **POLICIES[policies]}
        async with serving(Paced(), settings=settings) as server:
            for _ in range(10):
                await server.stub.Embed(HELLO)
            before = await state(server)
            server.plan.gate.clear()
            calls = [asyncio.ensure_future(server.stub.Embed(HELLO)) for _ in range(400)]
            await until(lambda: sum(call.done() for call in calls) + server.engine.requests == len(calls))
            during = await state(server)
            server.plan.gate.set()
            ended = await asyncio.gather(*calls, return_exceptions=True)
            await until(lambda: server.engine.requests == 0)
            after = await state(server)

        assert (before, during, after) == ("healthy", "overloaded", "healthy")
        assert any(isinstance(end, grpc.aio.AioRpcError) for end in ended)

    async def test_calls_in_flight_count(self) -> None:
        """Their limit refuses as well."""
        settings = {"limits.max_requests_in_flight": "2", "admission.policies": "none"}
        async with serving(FaultyBackend(FaultPlan()), settings=settings) as server:
            server.plan.gate.clear()
            held = [asyncio.ensure_future(server.stub.Embed(HELLO)) for _ in range(2)]
            await until(lambda: server.engine.requests == 2)
            full = await state(server)
            refused = await failure(server.stub.Embed(HELLO))
            server.plan.gate.set()
            await asyncio.gather(*held)

            assert (full, refused.reason) == ("overloaded", "TOO_MANY_REQUESTS_IN_FLIGHT")
            assert await state(server) == "healthy"

    async def test_a_queue_that_is_nearly_full_asks_for_less(self) -> None:
        settings = {"scheduling.max_queue_items": "10", "limits.max_texts": "10", "admission.policies": "none"}
        async with serving(FaultyBackend(FaultPlan()), settings=settings) as server:
            server.plan.gate.clear()
            told, held = [], []
            for texts in (7, 1, 2):
                held.append(asyncio.ensure_future(server.stub.Embed(pb.EmbedRequest(texts=["hello"] * texts))))
                await until(lambda: server.engine.requests == len(held))
                told.append(await state(server))
            server.plan.gate.set()
            await asyncio.gather(*held)

        assert told == ["healthy", "degraded", "overloaded"]
