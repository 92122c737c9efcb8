"""A silent, lost or lying device, as clients and orchestrators see it."""

from __future__ import annotations

import asyncio
import time

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2

from embedserve.lifecycle import State
from embedserve.testing import FaultPlan, FaultyBackend
from embedserve.testing.server import InProcessServer, serving
from embedserve.v1 import embedding_pb2 as pb
from tests.integration.server.calls import SERVICE, expected, failure, poison_id, until, values
from tests.integration.server.test_health import NOT_SERVING, SERVING, get, health

STALL = {"health.stall_ms": "60", "operations.enabled": "true"}


def embed(server: InProcessServer, *texts: str, timeout: float | None = None) -> asyncio.Future[pb.EmbedResponse]:
    return asyncio.ensure_future(server.stub.Embed(pb.EmbedRequest(texts=texts), timeout=timeout))


class TestStall:
    """NOT_SERVING while the device is silent, SERVING again when it answers."""

    async def test_every_way_to_ask_says_so_and_it_ends_by_itself(self) -> None:
        async with serving(FaultyBackend(FaultPlan()), settings=STALL) as server:
            watch = health(server).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
            before = (await watch.read()).status
            server.plan.gate.clear()
            first = embed(server, "hello")
            during = (await watch.read()).status
            check = (await health(server).Check(health_pb2.HealthCheckRequest())).status
            listed = (await health(server).List(health_pb2.HealthListRequest())).statuses[SERVICE].status
            load = await server.stub.GetLoad(pb.GetLoadRequest())
            http = [await get(server, path) for path in ("/livez", "/readyz", "/health")]
            refused = await failure(server.stub.Embed(pb.EmbedRequest(texts=["world"])))
            stream_refused = await failure(server.stub.EmbedStream(pb.EmbedStreamRequest(texts=["world"])).read())
            counted = await server.stub.CountTokens(pb.CountTokensRequest(texts=["hello"]))
            server.plan.gate.set()
            after = (await watch.read()).status
            answer = await first
            again = await embed(server, "world")

        assert (before, during, check, listed, after) == (SERVING, NOT_SERVING, NOT_SERVING, NOT_SERVING, SERVING)
        assert (load.state, load.accepting_requests) == (pb.LOAD_STATE_NOT_SERVING, False)
        assert [code for code, _ in http] == [200, 503, 503]
        assert "stalled" in http[1][1]
        for error in (refused, stream_refused):
            assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_STALLED")
            assert 800 <= int(dict(error.trailers)["grpc-retry-pushback-ms"]) <= 1200
        assert counted.total_tokens == 3
        assert np.allclose(values(answer.embeddings[0]), expected("hello"), atol=1e-6)
        assert np.allclose(values(again.embeddings[0]), expected("world"), atol=1e-6)

    async def test_waiting_calls_end_at_the_servers_own_limit_too(self) -> None:
        """A caller without a deadline has the server's; it does not wait for a sweep."""
        async with serving(FaultyBackend(FaultPlan()), settings=STALL | {"server.max_request_ms": "150"}) as server:
            server.plan.gate.clear()
            begun = time.monotonic()
            errors = await asyncio.gather(*(failure(embed(server, "hello")) for _ in range(4)))
            took_ms = (time.monotonic() - begun) * 1000

        assert {error.code for error in errors} == {grpc.StatusCode.DEADLINE_EXCEEDED}
        assert took_ms < 400

    async def test_a_pass_that_never_ends_ends_the_server_with_70(self) -> None:
        async with serving(FaultyBackend(FaultPlan()), settings=STALL | {"health.hang_ms": "200"}) as server:
            server.plan.gate.clear()
            errors = await asyncio.gather(*(failure(embed(server, "hello")) for _ in range(3)))
            code = await server.ended()

        assert {(error.code, error.reason) for error in errors} == {(grpc.StatusCode.INTERNAL, "ENGINE_FAILED")}
        assert code == 70

    async def test_a_stop_while_stalled_ends_within_the_grace(self) -> None:
        settings = STALL | {"shutdown.grace_ms": "300"}
        async with serving(FaultyBackend(FaultPlan()), settings=settings) as server:
            server.plan.gate.clear()
            held = embed(server, "hello")
            await until(lambda: server.lifecycle.state is State.STALLED)
            begun = time.monotonic()
            server.begin_stop()
            code = await server.ended()
            took_s = time.monotonic() - begun
            await failure(held)

        assert code == 3
        assert took_s < 2.5

    async def test_a_stop_while_stalled_with_nobody_in_flight_is_clean_and_quick(self) -> None:
        async with serving(FaultyBackend(FaultPlan()), settings=STALL) as server:
            server.plan.gate.clear()
            error = await failure(embed(server, "hello", timeout=0.15))
            await until(lambda: server.lifecycle.state is State.STALLED)
            begun = time.monotonic()
            server.begin_stop()
            code = await server.ended()
            took_s = time.monotonic() - begun

        assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert code == 0
        assert took_s < 2.5

    async def test_a_device_that_dies_while_the_server_drains_is_70(self) -> None:
        async with serving(FaultyBackend(FaultPlan())) as server:
            server.plan.gate.clear()
            held = embed(server, "hello")
            await until(lambda: server.engine.load().running_items == 1)
            server.begin_stop()
            await until(lambda: server.lifecycle.state is State.DRAINING)
            server.plan.lose_device = True
            server.plan.gate.set()
            error = await failure(held)
            code = await server.ended()

        assert error.code is grpc.StatusCode.INTERNAL
        assert code == 70


class TestIdle:
    """An idle server knows its device."""

    @pytest.mark.parametrize("fault", ["lose_device", "corrupt", "fail_every", "wrong_rows"])
    async def test_a_device_that_went_wrong_without_a_caller_ends_it_with_70(self, fault: str) -> None:
        async with serving(FaultyBackend(FaultPlan()), settings={"health.canary_interval_ms": "30"}) as server:
            watch = health(server).Watch(health_pb2.HealthCheckRequest())
            before = (await watch.read()).status
            setattr(server.plan, fault, True)
            after = (await watch.read()).status
            code = await server.ended()

        assert (before, after, code) == (SERVING, NOT_SERVING, 70)


class TestSuspect:
    """Poison is a caller's, a device on which everything fails is not."""

    async def test_fifty_calls_of_nothing_but_poison_do_not_end_it(self) -> None:
        async with serving(FaultyBackend(FaultPlan(raise_on_id=poison_id()))) as server:
            errors = [await failure(embed(server, "poison")) for _ in range(50)]
            answer = await embed(server, "hello")

        assert {(error.code, error.reason) for error in errors} == {(grpc.StatusCode.INTERNAL, "ITEM_FAILED")}
        assert np.allclose(values(answer.embeddings[0]), expected("hello"), atol=1e-6)

    async def test_a_device_on_which_every_pass_fails_ends_it_with_70(self) -> None:
        async with serving(FaultyBackend(FaultPlan())) as server:
            server.plan.fail_every = True
            errors = [await failure(embed(server, *["hello"] * 8)) for _ in range(4)]
            code = await server.ended()

        assert grpc.StatusCode.INTERNAL in {error.code for error in errors}
        assert code == 70
