"""Each fault does what its name says, to the byte where it is about bytes, and nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from embedserve.testing import FaultProxy

LIMIT_S = 10.0


class Echo:
    """Says back what it hears, and keeps the sizes of what it heard at once."""

    def __init__(self) -> None:
        self.heard = b""
        self.sizes: list[int] = []
        self.ends: list[str] = []
        self.address = ""
        self.mute = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                self.heard += data
                self.sizes.append(len(data))
                if not self.mute:
                    writer.write(data)
            self.ends.append("eof")
        except ConnectionError as error:
            self.ends.append(type(error).__name__)
        finally:
            writer.close()


@asynccontextmanager
async def echoing() -> AsyncIterator[Echo]:
    echo = Echo()
    server = await asyncio.start_server(echo.serve, "127.0.0.1", 0)
    echo.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        yield echo


@asynccontextmanager
async def connected(proxy: FaultProxy) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, port = proxy.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        async with asyncio.timeout(LIMIT_S):
            yield reader, writer
    finally:
        writer.close()


@pytest.fixture
async def echo() -> AsyncIterator[Echo]:
    async with echoing() as made:
        yield made


@pytest.fixture
async def proxy(echo: Echo) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(echo.address, seed=3) as made:
        yield made


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110 - sockets have no event for what their other end does
            await asyncio.sleep(0.002)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class TestWithoutFaults:
    """A proxy that is told nothing is a wire."""

    async def test_every_byte_comes_in_order_and_is_counted(self, proxy: FaultProxy) -> None:
        sent = os.urandom(1_000_000)
        async with connected(proxy) as (reader, writer):
            writer.write(sent)
            writer.write_eof()
            got = await reader.read(-1)

        assert got == sent
        assert proxy.passed_bytes == {"client": len(sent), "server": len(sent)}
        assert proxy.connections == 1
        assert proxy.swallowed_bytes == 0

    async def test_a_server_that_is_not_there_is_a_reset(self, echo: Echo) -> None:
        async with FaultProxy("127.0.0.1:1") as proxy, connected(proxy) as (reader, _):
            with pytest.raises(ConnectionResetError):
                await reader.read(1)


class TestPace:
    """Time and size of what passes."""

    async def test_latency_is_that_of_each_direction(self, proxy: FaultProxy) -> None:
        proxy.to_server(latency_ms=40)
        proxy.to_client(latency_ms=60)
        async with connected(proxy) as (reader, writer):
            begun = time.monotonic()
            writer.write(b"x")
            await reader.readexactly(1)
            took = time.monotonic() - begun

        assert 0.1 <= took < 1

    async def test_latency_does_not_take_throughput(self, proxy: FaultProxy) -> None:
        """A long line holds what is on its way: 100 chunks are late once, not 100 times."""
        proxy.both(latency_ms=100)
        async with connected(proxy) as (reader, writer):
            begun = time.monotonic()
            writer.write(bytes(1_600_000))
            await reader.readexactly(1_600_000)
            took = time.monotonic() - begun

        assert 0.2 <= took < 2

    async def test_jitter_keeps_the_order(self, proxy: FaultProxy) -> None:
        proxy.both(jitter_ms=10)
        sent = os.urandom(200_000)
        async with connected(proxy) as (reader, writer):
            for start in range(0, len(sent), 10_000):
                writer.write(sent[start : start + 10_000])
                await writer.drain()
            assert await reader.readexactly(len(sent)) == sent

    async def test_bandwidth(self, proxy: FaultProxy) -> None:
        proxy.to_server(bytes_per_s=20_000)
        async with connected(proxy) as (reader, writer):
            begun = time.monotonic()
            writer.write(bytes(6_000))
            await reader.readexactly(6_000)
            took = time.monotonic() - begun

        assert 0.28 <= took < 2

    async def test_slices(self, proxy: FaultProxy, echo: Echo) -> None:
        proxy.to_server(slice_bytes=1)
        async with connected(proxy) as (reader, writer):
            writer.write(b"hello world")
            assert await reader.readexactly(11) == b"hello world"

        assert len(echo.sizes) > 5


class TestDamage:
    """What is lost, and exactly where."""

    @pytest.mark.parametrize(
        ("fault", "end"), [("cut_after_bytes", "eof"), ("reset_after_bytes", "ConnectionResetError")]
    )
    async def test_after_so_many_bytes_and_no_more(self, proxy: FaultProxy, echo: Echo, fault: str, end: str) -> None:
        proxy.to_server(**{fault: 70_001})
        echo.mute = True
        async with connected(proxy) as (_, writer):
            writer.write(bytes(200_000))
            await until(lambda: echo.ends)

        assert echo.ends == [end]
        assert proxy.passed_bytes["server"] == 70_001
        assert len(echo.heard) == 70_001 or (end != "eof" and len(echo.heard) < 70_001)

    async def test_one_bit_of_one_byte(self, proxy: FaultProxy, echo: Echo) -> None:
        proxy.to_server(corrupt_byte=20_000)
        sent = os.urandom(50_000)
        async with connected(proxy) as (reader, writer):
            writer.write(sent)
            await reader.readexactly(len(sent))

        wrong = [place for place, (a, b) in enumerate(zip(sent, echo.heard, strict=True)) if a != b]
        assert wrong == [20_000]
        assert (sent[20_000] ^ echo.heard[20_000]).bit_count() == 1

    async def test_the_seed_decides_what_is_random(self, echo: Echo) -> None:
        async def heard(seed: int) -> bytes:
            echo.heard = b""
            async with FaultProxy(echo.address, seed=seed) as proxy:
                proxy.to_server(corrupt_byte=0)
                async with connected(proxy) as (reader, writer):
                    writer.write(b"\0")
                    await reader.readexactly(1)
            return echo.heard

        assert len({await heard(5) for _ in range(4)}) == 1
        assert len({await heard(seed) for seed in range(12)}) > 1

    async def test_a_blackhole_takes_and_gives_nothing(self, proxy: FaultProxy, echo: Echo) -> None:
        proxy.to_client(blackhole=True)
        async with connected(proxy) as (reader, writer):
            writer.write(b"hello")
            await until(lambda: proxy.swallowed_bytes == 5)
            assert echo.heard == b"hello"
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await reader.read(1)

    async def test_a_blackhole_swallows_the_end_too(self, proxy: FaultProxy, echo: Echo) -> None:
        async with connected(proxy) as (reader, writer):
            writer.write(b"a")
            await reader.readexactly(1)
            proxy.to_server(blackhole=True)
            writer.write_eof()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await reader.read(1)

        assert echo.ends == []

    async def test_what_was_held_comes_when_it_is_let_go(self, proxy: FaultProxy, echo: Echo) -> None:
        proxy.to_server(held=True)
        async with connected(proxy) as (reader, writer):
            writer.write(b"hello")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await reader.read(1)
            assert echo.heard == b""
            proxy.restore()
            assert await reader.readexactly(5) == b"hello"


class TestConnections:
    """Ends that go, alone or together."""

    async def test_reset_is_a_reset_at_both_ends(self, proxy: FaultProxy, echo: Echo) -> None:
        async with connected(proxy) as (reader, writer):
            writer.write(b"a")
            await reader.readexactly(1)
            proxy.reset_connections()
            with pytest.raises(ConnectionResetError):
                await reader.read(1)
            await until(lambda: echo.ends)

        assert echo.ends == ["ConnectionResetError"]

    async def test_cut_is_an_end_in_order(self, proxy: FaultProxy, echo: Echo) -> None:
        async with connected(proxy) as (reader, writer):
            writer.write(b"a")
            await reader.readexactly(1)
            proxy.cut_connections()
            assert await reader.read(1) == b""
            await until(lambda: echo.ends)

        assert echo.ends == ["eof"]

    async def test_half_open_leaves_one_end_that_knows_nothing(self, proxy: FaultProxy, echo: Echo) -> None:
        async with connected(proxy) as (reader, writer):
            writer.write(b"a")
            await reader.readexactly(1)
            proxy.half_open("server")
            await until(lambda: echo.ends)
            writer.write(b"is anybody there")
            await until(lambda: proxy.swallowed_bytes == 16)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await reader.read(1)
        await until(lambda: proxy.open_connections == 0)

        assert echo.heard == b"a"

    async def test_refusing_and_restored(self, proxy: FaultProxy) -> None:
        proxy.refusing = True
        async with connected(proxy) as (reader, _):
            with pytest.raises(ConnectionResetError):
                await reader.read(1)
        proxy.restore()
        async with connected(proxy) as (reader, writer):
            writer.write(b"a")
            assert await reader.readexactly(1) == b"a"

    @pytest.mark.parametrize("faults", [{}, {"held": True}, {"blackhole": True}, {"bytes_per_s": 1}])
    async def test_leaving_leaves_no_task_and_no_descriptor(self, echo: Echo, faults: dict[str, object]) -> None:
        tasks, opened = len(asyncio.all_tasks()), descriptors()
        async with FaultProxy(echo.address) as proxy:
            proxy.both(**faults)
            for _ in range(5):
                async with connected(proxy) as (_, writer):
                    writer.write(bytes(2_000_000))  # more than the proxy and the system hold
                    await until(lambda: proxy.open_connections)
        await until(lambda: len(asyncio.all_tasks()) <= tasks)
        await until(lambda: descriptors() <= opened)
