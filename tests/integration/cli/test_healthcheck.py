"""``embedserve healthcheck`` against gRPC's own health servicer."""

import asyncio

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from embedserve.probe import check_health, target_of

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
async def servicer(tmp_path):
    """A health servicer on a port and on a socket, with both addresses."""
    server = grpc.aio.server()
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    servicer.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    servicer.socket = f"unix:{tmp_path}/e.sock"
    server.add_insecure_port(servicer.socket)
    await server.start()
    yield servicer
    await server.stop(0)


class TestProbe:
    async def test_serving_is_healthy(self, servicer):
        assert await asyncio.to_thread(check_health, servicer.address, "", 5000) is None

    async def test_a_unix_socket(self, servicer):
        assert await asyncio.to_thread(check_health, servicer.socket, "", 5000) is None

    async def test_one_service(self, servicer):
        await servicer.set("embedserve.v1.EmbeddingService", NOT_SERVING)
        why = await asyncio.to_thread(check_health, servicer.address, "embedserve.v1.EmbeddingService", 5000)
        assert why == f"{servicer.address}: embedserve.v1.EmbeddingService is NOT_SERVING"

    async def test_a_service_that_is_not_there(self, servicer):
        why = await asyncio.to_thread(check_health, servicer.address, "other", 5000)
        assert why.startswith(f"{servicer.address}: NOT_FOUND")

    async def test_a_server_that_does_not_answer(self):
        listening = await asyncio.start_server(lambda _reader, _writer: None, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        why = await asyncio.to_thread(check_health, f"127.0.0.1:{port}", "", 100)
        assert why.startswith(f"127.0.0.1:{port}: DEADLINE_EXCEEDED")
        listening.close()

    @pytest.mark.parametrize(
        ("address", "target"),
        [
            ("0.0.0.0:50051", "127.0.0.1:50051"),
            ("[::]:50051", "[::1]:50051"),
            ("10.0.0.1:1", "10.0.0.1:1"),
            ("unix:/run/e.sock", "unix:/run/e.sock"),
        ],
    )
    def test_a_server_on_any_address_is_asked_on_loopback(self, address, target):
        assert target_of(address) == target


class TestCommand:
    async def test_serving_is_exit_0_and_silence(self, servicer, command):
        assert await command("healthcheck", "--address", servicer.address, "--timeout-ms", "5000") == (0, b"", "")

    async def test_the_first_address_of_the_settings_is_asked(self, servicer, command):
        env = {"EMBEDSERVE_SERVER_ADDRESS": f"{servicer.socket},127.0.0.1:1", "EMBEDSERVE_MODEL_SOURCE": "/not/here"}
        assert await command("healthcheck", "--timeout-ms", "5000", env=env) == (0, b"", "")

    async def test_not_serving_is_exit_1_and_one_line(self, servicer, command):
        await servicer.set("", NOT_SERVING)
        code, output, errors = await command("healthcheck", "--address", servicer.address, "--timeout-ms", "5000")
        assert (code, output) == (1, b"")
        assert errors == f"embedserve: {servicer.address}: the server is NOT_SERVING\n"

    async def test_nobody_there_is_exit_1_and_one_line(self, command):
        code, _, errors = await command("healthcheck", "--address", "127.0.0.1:1")
        assert code == 1
        assert errors.startswith("embedserve: 127.0.0.1:1: UNAVAILABLE: ")
        assert errors.count("\n") == 1

    async def test_a_wrong_address_is_exit_2(self, command):
        code, _, errors = await command("healthcheck", "--address", "nonsense")
        assert code == 2
        assert "server.address = nonsense (flag --server.address)" in errors

    async def test_a_proxy_for_the_outside_is_not_asked(self, servicer, command):
        env = {"http_proxy": "http://127.0.0.1:1", "grpc_proxy": "http://127.0.0.1:1"}
        code, _, errors = await command("healthcheck", "--address", servicer.address, "--timeout-ms", "5000", env=env)
        assert (code, errors) == (0, "")
