"""An ordinary client beside an attack, and what an attack may cost: time, memory, nothing for good."""

from __future__ import annotations

import asyncio
import re
import time
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio

from embedserve.v1 import embedding_pb2 as pb
from embedserve.v1.embedding_pb2_grpc import EmbeddingServiceStub
from tests.integration.server.process import ServerProcess

OTHERS_S_MAX = 5.0
"""The figures are a few milliseconds; but the client shares an event loop with 10,000 frames, on a busy machine."""
RSS_GROWTH_MAX = 96 << 20
"""Of one attack. Core keeps what it has allocated once."""
PAUSE_S = 0.01
QUIET_S = 20.0
"""How long the server may take to be as quiet as before."""


def rss(server: ServerProcess) -> int:
    """Resident bytes now."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) << 10  # type: ignore[index]


def page(server: ServerProcess) -> str:
    """What /metrics says."""
    with urllib.request.urlopen(server.operations + "/metrics", timeout=10) as answer:
        return str(answer.read().decode())


async def active_calls(server: ServerProcess) -> int:
    """Calls that have arrived and not ended, of all methods."""
    text = await asyncio.to_thread(page, server)
    return int(sum(map(float, re.findall(r"^embedserve_rpc_active_calls{.*} (\S+)$", text, re.MULTILINE))))


async def until_active(server: ServerProcess, enough: Callable[[int], bool]) -> None:
    """Until ``enough`` is true of the calls in flight."""
    ends = time.monotonic() + QUIET_S
    while not enough(calls := await active_calls(server)):
        assert time.monotonic() < ends, f"{calls} calls are in flight"
        await asyncio.sleep(0.02)


@dataclass
class Cost:
    """What an attack has cost, filled in when it is over."""

    others_ms: list[float] = field(default_factory=list)
    growth: int = 0

    def __str__(self) -> str:
        times = sorted(self.others_ms)
        return (
            f"others: {len(times)} calls, median {times[len(times) // 2]:.1f} ms, longest {times[-1]:.1f} ms; "
            f"memory {self.growth / 2**20:+.1f} MiB"
        )


@asynccontextmanager
async def beside(server: ServerProcess, *, growth_max: int = RSS_GROWTH_MAX) -> AsyncIterator[Cost]:
    """Attack within the block: all the while, and afterwards, an ordinary client is served in time.

    Then no call is in flight, the memory is bounded and the process lives.
    """
    cost = Cost()
    over = asyncio.Event()

    async def ordinary(stub: EmbeddingServiceStub) -> None:
        while not over.is_set() or len(cost.others_ms) < 5:
            begun = time.monotonic()
            answer = await stub.Embed(pb.EmbedRequest(texts=["hello world"]), timeout=30)
            assert len(answer.embeddings) == 1
            cost.others_ms.append((time.monotonic() - begun) * 1e3)
            await asyncio.sleep(PAUSE_S)

    before = rss(server)
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = EmbeddingServiceStub(channel)
        await stub.Embed(pb.EmbedRequest(texts=["hello world"]))
        client = asyncio.create_task(ordinary(stub))
        try:
            yield cost
        finally:
            over.set()
            await client
    await until_active(server, lambda calls: calls == 0)
    cost.growth = rss(server) - before
    print(cost)  # noqa: T201  # the figures, with -rP
    assert max(cost.others_ms) < OTHERS_S_MAX * 1e3, str(cost)
    assert cost.growth < growth_max, str(cost)
    assert server.process.poll() is None
