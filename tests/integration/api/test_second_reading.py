"""What a second reader found on the services beside our own: garbage, and names that could not be described."""

from __future__ import annotations

import grpc
import pytest
from google.protobuf import descriptor_pool

from embedserve.api.health import HealthService
from embedserve.api.reflection import SERVICE_NAMES, add_reflection


class TestHealth:
    @pytest.mark.parametrize("method", ["Check", "List"])
    async def test_garbage_is_told_as_such_and_nothing_of_python(self, method: str) -> None:
        server = grpc.aio.server()
        HealthService(()).add_to(server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(f"/grpc.health.v1.Health/{method}")(b"\xff" * 9)
        await server.stop(None)

        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert caught.value.details() == "the bytes are not a valid health request"


class TestReflection:
    async def test_both_names_are_described(self) -> None:
        server = grpc.aio.server()
        add_reflection(server, ())
        add_reflection(grpc.aio.server(), ())  # a second server in the process finds the file there

        methods = [descriptor_pool.Default().FindServiceByName(name).methods_by_name for name in SERVICE_NAMES]
        assert [list(m) for m in methods] == [["ServerReflectionInfo"]] * 2
        assert methods[1]["ServerReflectionInfo"].input_type.full_name.startswith("grpc.reflection.v1.")
