"""Two real servers and clients with the published service config: a storm dies out, and a lost server loses nothing."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from embedserve.v1 import embedding_pb2 as pb
from embedserve.v1.embedding_pb2_grpc import EmbeddingServiceStub
from tests.integration.clients.fleet import SERVICE, attempts, connect, metric, published
from tests.integration.clients.paced_server import PACED
from tests.integration.server.calls import until
from tests.integration.server.process import ServerProcess, running

HELLO = pb.EmbedRequest(texts=["hello"])
LIMIT_S = 60.0


@contextmanager
def two(
    *flags: str, pass_ms: tuple[int, int], command: tuple[str, ...] = PACED
) -> Iterator[tuple[ServerProcess, ServerProcess]]:
    """Two servers that need so long for a pass of at most four texts."""
    small = ("--scheduling.max_batch_items", "4", *flags)
    with (
        running(*small, command=command, PASS_MS=str(pass_ms[0])) as one,
        running(*small, command=command, PASS_MS=str(pass_ms[1])) as other,
    ):
        yield one, other


def channels(one: ServerProcess, other: ServerProcess, config: dict[str, Any]) -> list[grpc.aio.Channel]:
    """Four clients. Targets that are spelled differently have retry tokens of their own, as processes would."""
    a, b = one.address, other.address
    return [connect(*order, config=config) for order in ((a, b), (b, a), (a, b, a, b), (b, a, b, a))]


async def offer(
    stubs: list[EmbeddingServiceStub], rate: float, for_s: float, ask: Callable[[EmbeddingServiceStub], Awaitable[str]]
) -> Counter[str]:
    """Send ``rate`` calls a second, whatever becomes of them, and count how they end."""
    begun, calls = time.monotonic(), []
    while (elapsed := time.monotonic() - begun) < for_s:
        while len(calls) < elapsed * rate:
            calls.append(asyncio.ensure_future(ask(stubs[len(calls) % len(stubs)])))
        await asyncio.sleep(0.005)
    return Counter(await asyncio.gather(*calls))


def under_way(server: ServerProcess) -> float:
    """Calls of Embed that are there now."""
    return metric(server, "embedserve_rpc_active_calls", f'"{SERVICE}/Embed"')


async def by_config(stub: EmbeddingServiceStub) -> str:
    """One call, its retries left to gRPC."""
    try:
        await stub.Embed(HELLO, timeout=5)
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


async def by_hand(stub: EmbeddingServiceStub) -> str:
    """Four attempts at once: the loop that everybody has written."""
    ended = ""
    for _ in range(4):
        ended = await by_config(stub)
        if ended == "OK":
            break
    return ended


class TestStorm:
    """More than twice what both can do, for two seconds."""

    RATE, CAPACITY = 300, 4 / 0.040 + 4 / 0.120

    async def ratio(
        self, servers: tuple[ServerProcess, ServerProcess], config: dict[str, Any], ask: Callable[..., Awaitable[str]]
    ) -> tuple[float, Counter[str]]:
        """Attempts a request in the burst, and how it ended."""
        clients = channels(*servers, config)
        stubs = [EmbeddingServiceStub(channel) for channel in clients]
        try:
            for _ in range(8):  # connected, and the servers know their pace
                await asyncio.gather(*(stub.Embed(HELLO) for stub in stubs))
            before = sum(map(attempts, servers))
            burst = await offer(stubs, self.RATE, 2.0, ask)
            ratio = (sum(map(attempts, servers)) - before) / burst.total()
            if ask is by_config:
                await offer(stubs, 20, 1.0, ask)
                assert (await offer(stubs, 20, 1.0, ask)).keys() == {"OK"}, "a light load is served after it"
        finally:
            for channel in clients:
                await channel.close()
        return ratio, burst

    @pytest.mark.timeout(LIMIT_S)
    def test_it_dies_out(self) -> None:
        """Tokens and pushbacks bound the attempts; without them each failure is three calls more."""
        assert self.RATE > 2 * self.CAPACITY
        with two("--admission.throughput.max_drain_ms", "600", pass_ms=(40, 120)) as servers:
            ratio, burst = asyncio.run(self.ratio(servers, published(), by_config))
            retried = sum(metric(server, "embedserve_rpc_retries_total") for server in servers)
        with two("--admission.throughput.max_drain_ms", "600", pass_ms=(40, 120)) as servers:
            plain = published(methodConfig=None, retryThrottling=None)
            naive, _ = asyncio.run(self.ratio(servers, plain, by_hand))

        assert 0 < retried < 0.5 * burst.total()
        assert burst["RESOURCE_EXHAUSTED"] > 0.2 * burst.total()
        assert burst.keys() == {"OK", "RESOURCE_EXHAUSTED"}
        assert ratio < 1.5
        assert naive > 2.0


class TestLostServer:
    """One of two goes while 32 calls of one channel are under way: every call is answered."""

    CALLERS = 32

    async def calls(
        self, servers: tuple[ServerProcess, ServerProcess], config: dict[str, Any], end: signal.Signals
    ) -> Counter[str]:
        """How calls end that go on before, while and after the first server gets its signal."""
        one, other = servers
        ended: Counter[str] = Counter()
        going = True

        async def caller(stub: EmbeddingServiceStub) -> None:
            while going:
                ended[await by_config(stub)] += 1

        async with connect(one.address, other.address, config=config) as channel:
            stub = EmbeddingServiceStub(channel)
            for _ in range(4):
                await stub.Embed(HELLO)
            callers = [asyncio.ensure_future(caller(stub)) for _ in range(self.CALLERS)]
            await until(lambda: min(map(under_way, servers)) >= self.CALLERS / 4)
            one.process.send_signal(end)
            await asyncio.to_thread(one.ended)
            enough = ended["OK"] + 100
            await until(lambda: ended["OK"] >= enough)
            going = False
            await asyncio.gather(*callers)
        return ended

    @pytest.mark.timeout(LIMIT_S)
    @pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
    def test_nothing_is_lost(self, end: signal.Signals) -> None:
        with two("--admission.policies", "none", pass_ms=(60, 60)) as servers:
            ended = asyncio.run(self.calls(servers, published(), end))

            assert ended.keys() == {"OK"}
            if end is signal.SIGTERM:
                assert servers[0].ended() == 0

    @pytest.mark.timeout(LIMIT_S)
    def test_with_ten_tokens_calls_would_be(self) -> None:
        """Why the service config has a hundred: every call that dies with the server takes one."""
        few = published(retryThrottling={"maxTokens": 10, "tokenRatio": 0.1})
        with two("--admission.policies", "none", pass_ms=(60, 60)) as servers:
            ended = asyncio.run(self.calls(servers, few, signal.SIGKILL))

        assert ended["UNAVAILABLE"] >= 1
