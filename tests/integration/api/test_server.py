"""The server's addresses and the limits of its transport."""

import gzip
import socket
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from embedserve.api.server import ServerOptions, bind, build_server
from embedserve.errors import StartupError


@pytest.fixture
async def server() -> Any:
    built = build_server(ServerOptions())
    yield built
    await built.stop(None)


@pytest.fixture
def taken() -> Any:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def echo(server: grpc.aio.Server) -> None:
    async def handler(request: bytes, context: Any) -> bytes:
        return request * 2

    method = grpc.unary_unary_rpc_method_handler(handler)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("a.B", {"C": method}),))


class TestBind:
    async def test_a_taken_port_is_named(self, server: grpc.aio.Server, taken: int) -> None:
        """A sentence with the address instead of a second server that takes half the connections."""
        with pytest.raises(StartupError, match=f"127.0.0.1:{taken}"):
            bind(server, ["127.0.0.1:0", f"127.0.0.1:{taken}"])

    async def test_a_port_of_another_grpc_server(self, server: grpc.aio.Server) -> None:
        """gRPC's own default would share it in silence."""
        first = build_server(ServerOptions())
        (port,) = bind(first, ["127.0.0.1:0"])
        await first.start()
        try:
            with pytest.raises(StartupError, match=str(port)):
                bind(server, [f"127.0.0.1:{port}"])
        finally:
            await first.stop(None)

    async def test_several_servers_where_that_is_meant(self) -> None:
        """With ``so_reuseport``, both listen."""
        first, second = (build_server(ServerOptions(so_reuseport=True)) for _ in range(2))
        (port,) = bind(first, ["127.0.0.1:0"])

        assert bind(second, [f"127.0.0.1:{port}"]) == [port]
        await first.stop(None)
        await second.stop(None)

    @pytest.mark.parametrize("address", ["127.0.0.1:99999", "203.0.113.7:0", "not an address", "unix:/no/such/dir/s"])
    async def test_a_wrong_address_is_named(self, server: grpc.aio.Server, address: str) -> None:
        """Whatever is wrong with it."""
        with pytest.raises(StartupError, match="cannot listen"):
            bind(server, [address])

    async def test_unix_socket(self, server: grpc.aio.Server, tmp_path: Path) -> None:
        """Serves, beside a port."""
        echo(server)
        bind(server, [f"unix:{tmp_path}/s", "127.0.0.1:0"])
        await server.start()
        async with grpc.aio.insecure_channel(f"unix:{tmp_path}/s") as channel:
            assert await channel.unary_unary("/a.B/C")(b"x") == b"xx"

    async def test_a_unix_socket_in_use_is_left_alone(self, server: grpc.aio.Server, tmp_path: Path) -> None:
        """gRPC would unlink it and take its clients over."""
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(f"{tmp_path}/s")
            other.listen()
            with pytest.raises(StartupError, match="another process"):
                bind(server, [f"unix:{tmp_path}/s"])

    async def test_a_unix_socket_left_behind_is_replaced(self, server: grpc.aio.Server, tmp_path: Path) -> None:
        """A process that was killed leaves its socket file."""
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(f"{tmp_path}/s")

        assert bind(server, [f"unix:{tmp_path}/s"]) == [1]


class TestLimits:
    @pytest.fixture
    async def channel(self) -> Any:
        options = ServerOptions(max_receive_message_bytes=10_000, max_send_message_bytes=10_000)
        server = build_server(options)
        echo(server)
        (port,) = bind(server, ["127.0.0.1:0"])
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
        await server.stop(None)

    async def refused(self, channel: grpc.aio.Channel, request: bytes, **options: Any) -> grpc.aio.AioRpcError:
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await channel.unary_unary("/a.B/C")(request, **options)
        assert await channel.unary_unary("/a.B/C")(b"x") == b"xx"
        return refusal.value

    async def test_a_request_that_is_too_large(self, channel: grpc.aio.Channel) -> None:
        """Is refused before any handler, and the connection lives on."""
        assert (await self.refused(channel, b"x" * 10_001)).code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    async def test_a_small_request_that_grows(self, channel: grpc.aio.Channel) -> None:
        """The limit holds after decompression."""
        bomb = bytes(1 << 20)
        assert len(gzip.compress(bomb)) < 10_000
        refusal = await self.refused(channel, bomb, compression=grpc.Compression.Gzip)

        assert refusal.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    async def test_an_answer_that_is_too_large(self, channel: grpc.aio.Channel) -> None:
        """Is never sent in part."""
        assert (await self.refused(channel, b"x" * 6000)).code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    async def test_metadata_that_is_too_large(self, channel: grpc.aio.Channel) -> None:
        """20 kB of headers."""
        refusal = await self.refused(channel, b"x", metadata=[("k", "v" * 20_000)])

        assert refusal.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
