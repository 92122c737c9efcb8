"""grpc.health.v1 over a real connection, behind the guard."""

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from embedserve.api.guard import SERVICE
from embedserve.api.health import HealthService

SERVING, NOT_SERVING, UNKNOWN = (
    health_pb2.HealthCheckResponse.SERVING,
    health_pb2.HealthCheckResponse.NOT_SERVING,
    health_pb2.HealthCheckResponse.SERVICE_UNKNOWN,
)


@pytest.fixture
async def health() -> HealthService:
    return HealthService((SERVICE,))


@pytest.fixture
async def stub(serve: Any, health: HealthService) -> health_pb2_grpc.HealthStub:
    served = await serve(add=health.add_to)
    return health_pb2_grpc.HealthStub(served.channel)


def asked(service: str = "") -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=service)


async def check(stub: Any, service: str = "") -> int:
    return (await stub.Check(asked(service))).status


async def following(watch: Any) -> int:
    async with asyncio.timeout(5):
        return (await watch.read()).status


class TestCheck:
    @pytest.mark.parametrize("service", ["", SERVICE])
    async def test_not_serving_until_told(self, stub: Any, health: HealthService, service: str) -> None:
        """And back. The stock servicer begins as SERVING, before any model is loaded."""
        found = [await check(stub, service)]
        for serving in (True, False):
            health.set_serving(serving)
            found.append(await check(stub, service))

        assert found == [NOT_SERVING, SERVING, NOT_SERVING]

    async def test_unknown_service(self, stub: Any) -> None:
        """NOT_FOUND, as the protocol says."""
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Check(asked("other"))

        assert refused.value.code() is grpc.StatusCode.NOT_FOUND


class TestList:
    async def test_lists_every_name(self, stub: Any, health: HealthService) -> None:
        """The process and its service. The stock aio servicer answers UNIMPLEMENTED."""
        health.set_serving(True)
        listed = await stub.List(health_pb2.HealthListRequest())

        assert {name: answer.status for name, answer in listed.statuses.items()} == {"": SERVING, SERVICE: SERVING}


class TestWatch:
    async def test_tells_every_change(self, stub: Any, health: HealthService) -> None:
        """The status now, then each change; saying the same twice sends nothing."""
        watch = stub.Watch(asked(SERVICE))
        found = [await following(watch)]
        for serving in (True, True, False, True):
            before = health.serving
            health.set_serving(serving)
            if serving != before:
                found.append(await following(watch))

        assert found == [NOT_SERVING, SERVING, NOT_SERVING, SERVING]
        watch.cancel()

    async def test_unknown_service_stays_open(self, stub: Any, health: HealthService) -> None:
        """SERVICE_UNKNOWN, and the stream waits."""
        watch = stub.Watch(asked("other"))
        assert await following(watch) == UNKNOWN
        health.set_serving(True)
        known = stub.Watch(asked())

        assert await following(known) == SERVING
        assert not watch.done()
        watch.cancel()
        known.cancel()

    async def test_graceful_shutdown_is_final(self, stub: Any, health: HealthService) -> None:
        """Watchers hear NOT_SERVING, and nothing later changes it."""
        health.set_serving(True)
        watch = stub.Watch(asked())
        assert await following(watch) == SERVING
        health.enter_graceful_shutdown()
        assert await following(watch) == NOT_SERVING
        health.set_serving(True)

        assert await check(stub) == NOT_SERVING
        assert not health.serving
        watch.cancel()

    async def test_many_watchers(self, stub: Any, health: HealthService) -> None:
        """All of them hear it, and setting the status waits for none."""
        watches = [stub.Watch(asked()) for _ in range(50)]
        await asyncio.gather(*(following(watch) for watch in watches))
        health.set_serving(True)

        assert await asyncio.gather(*(following(watch) for watch in watches)) == [SERVING] * 50
        for watch in watches:
            watch.cancel()

    async def test_closing_lets_the_server_stop_at_once(self, serve: Any, health: HealthService) -> None:
        """A watcher would otherwise hold the stop for the whole grace time."""
        served = await serve(add=health.add_to)
        health.set_serving(True)
        watch = health_pb2_grpc.HealthStub(served.channel).Watch(asked())
        assert await following(watch) == SERVING
        health.close()
        async with asyncio.timeout(5):
            await served.server.stop(60)

        assert await following(watch) == NOT_SERVING
        assert await watch.code() is grpc.StatusCode.UNAVAILABLE


class TestClientSideHealthChecking:
    async def test_a_client_leaves_a_server_that_says_not_serving(self, serve: Any) -> None:
        """gRPC clients with ``healthCheckConfig`` watch and pick only those that serve (gRFC A17)."""

        async def answer(request: Any, context: Any) -> bytes:
            return b"answer"

        health = HealthService((SERVICE,))
        served = await serve(answer, add=health.add_to)
        config = (
            '{"loadBalancingConfig":[{"round_robin":{}}],"healthCheckConfig":{"serviceName":"%s"}}' % SERVICE  # noqa: UP031
        )
        options = [("grpc.service_config", config)]
        async with grpc.aio.insecure_channel(f"ipv4:127.0.0.1:{served.port}", options=options) as channel:
            embed = channel.unary_unary(f"/{SERVICE}/Embed")
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await embed(b"")
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
            health.set_serving(True)

            assert await embed(b"", wait_for_ready=True, timeout=10) == b"answer"
