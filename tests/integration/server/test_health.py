"""Health, reflection and the operations port of the assembled server, through its life."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from embedserve.testing import FaultPlan, FaultyBackend
from embedserve.testing.server import InProcessServer, serving
from embedserve.v1 import embedding_pb2 as pb
from tests.integration.server.calls import LIMIT_S, SERVICE, LoadingBackend, failure, until

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
NAMES = ["", SERVICE]


def health(server: InProcessServer) -> health_pb2_grpc.HealthStub:
    return health_pb2_grpc.HealthStub(server.channel)


async def get(server: InProcessServer, path: str) -> tuple[int, str]:
    def ask() -> tuple[int, str]:
        try:
            with urllib.request.urlopen(server.operations_url + path, timeout=LIMIT_S) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    return await asyncio.to_thread(ask)


class TestHealth:
    """NOT_SERVING, SERVING, NOT_SERVING: for Check, List and Watch, for the process and the service."""

    @pytest.mark.parametrize("name", NAMES)
    async def test_watch_tells_every_change_from_loading_to_the_end(self, name: str) -> None:
        backend = LoadingBackend()
        # With no settle time at all the end follows the last message at once, and may overtake it at the client.
        async with serving(backend, wait_ready=False, settings={"shutdown.settle_ms": "200"}) as server:
            watch = health(server).Watch(health_pb2.HealthCheckRequest(service=name))
            loading = await watch.read()
            backend.warm.set()
            serving_now = await watch.read()
            server.begin_stop()
            draining = await watch.read()
            end = await failure(watch.read())
            code = await server.ended()

        assert [loading.status, serving_now.status, draining.status] == [NOT_SERVING, SERVING, NOT_SERVING]
        assert end.code is grpc.StatusCode.UNAVAILABLE
        assert code == 0

    @pytest.mark.parametrize("name", NAMES)
    async def test_check_and_list(self, name: str) -> None:
        backend = LoadingBackend()
        request = health_pb2.HealthCheckRequest(service=name)
        async with serving(backend, wait_ready=False, settings={"shutdown.settle_ms": "300"}) as server:
            stub = health(server)

            async def asked() -> tuple[int, int]:
                listed = await stub.List(health_pb2.HealthListRequest())
                assert set(listed.statuses) == set(NAMES)
                return (await stub.Check(request)).status, listed.statuses[name].status

            loading = await asked()
            backend.warm.set()
            await until(lambda: server.lifecycle.accepting)
            ready = await asked()
            server.begin_stop()
            await until(lambda: not server.lifecycle.accepting)
            draining = await asked()

        assert [loading, ready, draining] == [(NOT_SERVING,) * 2, (SERVING,) * 2, (NOT_SERVING,) * 2]

    async def test_a_dead_worker_is_told_before_the_end(self) -> None:
        async with serving(FaultyBackend(FaultPlan())) as server:
            watch = health(server).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == SERVING
            server.plan.die = SystemExit
            error = await failure(server.stub.Embed(pb.EmbedRequest(texts=["hello"])))
            status = (await watch.read()).status
            code = await server.ended()

        assert (error.code, error.reason) == (grpc.StatusCode.INTERNAL, "ENGINE_FAILED")
        assert error.metadata["error_id"] in error.message
        assert status == NOT_SERVING
        assert code == 70

    @pytest.mark.parametrize("fault", ["wrong_rows", "lose_device"])
    async def test_a_broken_invariant_ends_the_server_with_70(self, fault: str) -> None:
        async with serving(FaultyBackend(FaultPlan())) as server:
            setattr(server.plan, fault, True)
            server.plan.gate.clear()
            calls = [asyncio.ensure_future(server.stub.Embed(pb.EmbedRequest(texts=["hello"]))) for _ in range(5)]
            await until(lambda: server.engine.requests == 5)
            server.plan.gate.set()
            errors = await asyncio.gather(*(failure(call) for call in calls))
            code = await server.ended()

        assert {error.code for error in errors} == {grpc.StatusCode.INTERNAL}
        assert not any("CUDA" in error.message + str(error.trailers) for error in errors)
        assert code == 70


class TestReflection:
    """grpcurl works as it stands."""

    async def test_the_services_are_listed(self, server: InProcessServer) -> None:
        stub = reflection_pb2_grpc.ServerReflectionStub(server.channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        answer = await call.read()

        names = {service.name for service in answer.list_services_response.service}
        assert {SERVICE, "grpc.health.v1.Health"} <= names

    async def test_it_can_be_switched_off(self) -> None:
        async with serving(settings={"server.reflection": "false"}) as server:
            stub = reflection_pb2_grpc.ServerReflectionStub(server.channel)
            call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
            error = await failure(call.read())

        assert error.code is grpc.StatusCode.UNIMPLEMENTED

    async def test_an_open_reflection_stream_does_not_hold_the_shutdown(self) -> None:
        async with serving(settings={"shutdown.grace_ms": "8000"}) as server:
            stub = reflection_pb2_grpc.ServerReflectionStub(server.channel)
            call = stub.ServerReflectionInfo()
            await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            await call.read()
            server.begin_stop()
            async with asyncio.timeout(4):
                code = await server.ended()

        assert code == 0


class TestOperationsPort:
    """Probes and people ask over HTTP."""

    SETTINGS = {"operations.enabled": "true", "shutdown.settle_ms": "300"}  # noqa: RUF012

    async def test_readiness_follows_the_life_and_liveness_does_not(self) -> None:
        backend = LoadingBackend()
        async with serving(backend, wait_ready=False, settings=self.SETTINGS) as server:
            await until(lambda: not server.operations_url.endswith("None"))
            loading = [(await get(server, path))[0] for path in ("/livez", "/readyz", "/health")]
            backend.warm.set()
            await until(lambda: server.lifecycle.accepting)
            ready = [(await get(server, path))[0] for path in ("/livez", "/readyz", "/health")]
            server.begin_stop()
            await until(lambda: not server.lifecycle.accepting)
            draining = [(await get(server, path))[0] for path in ("/livez", "/readyz")]

        assert loading == [200, 503, 503]
        assert ready == [200, 200, 200]
        assert draining == [200, 503]

    async def test_health_has_the_fields_of_get_load(self) -> None:
        async with serving(settings=self.SETTINGS) as server:
            status, body = await get(server, "/health")

        fields = {field.name for field in pb.GetLoadResponse.DESCRIPTOR.fields} - {"state"}
        assert status == 200
        assert json.loads(body).keys() == fields | {"status"}
        assert json.loads(body)["status"] == "healthy"
