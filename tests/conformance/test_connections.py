"""The life of a connection: waiting for a server, age, pings; and the services that every connection finds."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from hyperframe.frame import GoAwayFrame, PingFrame

from embedserve.testing.server import InProcessServer, serving
from embedserve.v1 import embedding_pb2 as pb
from tests.conformance.frames import ENHANCE_YOUR_CALM, NO_ERROR, connected, data, grpc_message
from tests.integration.server.calls import SERVICE, LoadingBackend
from tests.integration.telemetry.collector import free_port

HELLO = pb.EmbedRequest(texts=["hello world"])


class TestWaitForReady:
    async def test_a_call_that_waits_is_served_by_the_server_that_comes(self) -> None:
        address = f"127.0.0.1:{free_port()}"
        options = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 100)]
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            embed = channel.unary_unary(f"/{SERVICE}/Embed", pb.EmbedRequest.SerializeToString)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await embed(HELLO, timeout=10)
            waiting = embed(HELLO, wait_for_ready=True, timeout=10)
            async with serving(settings={"server.address": address}):
                assert await waiting

        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


class TestAge:
    async def test_a_connection_of_full_age_is_renewed_without_a_failed_call(self) -> None:
        """GOAWAY with NO_ERROR; calls go on all the while, one running at that very moment among them."""
        settings = {"server.max_connection_age_ms": "1000", "server.max_connection_age_grace_ms": "5000"}
        async with serving(settings=settings) as server, connected(server.address) as raw:
            calls = 0

            async def calling() -> None:
                nonlocal calls
                while True:
                    assert (await server.stub.Embed(HELLO)).embeddings
                    calls += 1

            async with asyncio.TaskGroup() as group:
                callers = [group.create_task(calling()) for _ in range(4)]
                goaway = await raw.until(lambda f: isinstance(f, GoAwayFrame))
                await asyncio.sleep(1.5)  # what is promised is that for a second and a half nothing fails
                for caller in callers:
                    caller.cancel()
            assert isinstance(goaway, GoAwayFrame)
            assert goaway.error_code == NO_ERROR
            assert calls > 20
            await raw.ended()


class TestPings:
    async def test_pings_at_the_interval_allowed_are_answered(self) -> None:
        async with serving(settings={"server.min_ping_interval_ms": "100"}) as server, connected(server.address) as raw:
            for number in range(6):
                await asyncio.sleep(0.15)
                payload = number.to_bytes(8, "big")
                await raw.send(PingFrame(0, payload))
                await raw.until(lambda f, payload=payload: isinstance(f, PingFrame) and f.opaque_data == payload)

            assert raw.goaway is None
            await raw.send(raw.call(1), data(1, grpc_message(HELLO.SerializeToString())))
            assert (await raw.trailers(1))["grpc-status"] == "0"

    async def test_more_often_is_sent_away(self, server: InProcessServer) -> None:
        """ENHANCE_YOUR_CALM with ``too_many_pings``, by gRFC A8; other connections are served on."""
        async with connected(server.address) as raw:
            for number in range(6):
                payload = number.to_bytes(8, "big")
                await raw.send(PingFrame(0, payload))
                # One at a time: what still comes in when the server closes makes a reset that overtakes the GOAWAY.
                answer = await raw.until(
                    lambda f, p=payload: isinstance(f, GoAwayFrame) or (isinstance(f, PingFrame) and f.opaque_data == p)
                )
                if isinstance(answer, GoAwayFrame):
                    break
            await raw.ended()

        assert raw.goaway is not None
        assert raw.goaway.error_code == ENHANCE_YOUR_CALM
        assert raw.goaway.additional_data == b"too_many_pings"
        assert (await server.stub.Embed(HELLO)).embeddings


class TestServices:
    async def test_exactly_ours_health_and_reflection_are_served(self, server: InProcessServer) -> None:
        """The admin surface: nothing loads, unloads, configures or stops by gRPC."""
        names = {"v1": "grpc.reflection.v1.ServerReflection", "v1alpha": "grpc.reflection.v1alpha.ServerReflection"}
        for service in names.values():
            call = server.channel.stream_stream(
                f"/{service}/ServerReflectionInfo",
                reflection_pb2.ServerReflectionRequest.SerializeToString,
                reflection_pb2.ServerReflectionResponse.FromString,
            )(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
            (response,) = [response async for response in call]
            listed = {entry.name for entry in response.list_services_response.service}
            assert listed == {SERVICE, "grpc.health.v1.Health", *names.values()}

    @pytest.mark.parametrize(
        "method",
        [
            "/grpc.channelz.v1.Channelz/GetServers",
            "/grpc.admin.v1.Admin/Get",
            "/envoy.service.status.v3.ClientStatusDiscoveryService/FetchClientStatus",
            "/inference.GRPCInferenceService/RepositoryModelLoad",
            f"/{SERVICE}/LoadModel",
            f"/{SERVICE}/Shutdown",
        ],
    )
    async def test_what_is_not_listed_is_not_there_either(self, server: InProcessServer, method: str) -> None:
        """Reflection lists what it was told; this asks."""
        assert await server.channel.unary_unary(method)(b"").code() is grpc.StatusCode.UNIMPLEMENTED

    async def test_without_reflection_only_ours_and_health(self) -> None:
        async with serving(settings={"server.reflection": "false"}) as server:
            for version in ("v1", "v1alpha"):
                call = server.channel.stream_stream(
                    f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
                )(iter([b""]))
                assert await call.code() is grpc.StatusCode.UNIMPLEMENTED

    async def test_health_by_a90_while_loading_and_serving(self) -> None:
        """Check, List (gRFC A90) and Watch say the same at each moment; unknown names are told as such."""
        backend = LoadingBackend()
        async with serving(backend, wait_ready=False) as server:
            stub = health_pb2_grpc.HealthStub(server.channel)
            watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
            for answer, release in (
                (health_pb2.HealthCheckResponse.NOT_SERVING, backend.warm.set),
                (health_pb2.HealthCheckResponse.SERVING, lambda: None),
            ):
                assert (await watch.read()).status == answer
                statuses = (await stub.List(health_pb2.HealthListRequest())).statuses
                assert {name: status.status for name, status in statuses.items()} == {"": answer, SERVICE: answer}
                for name in ("", SERVICE):
                    assert (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status == answer
                release()
            unknown = health_pb2.HealthCheckRequest(service="nobody")
            assert await stub.Check(unknown).code() is grpc.StatusCode.NOT_FOUND
            assert (await stub.Watch(unknown).read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
