"""Pictures of the page for somebody to look at: ``python -m tests.integration.http.pictures FOLDER``.

Whether a page is clear no test can say. After a change to it, look at it empty, under load, stalled and starting, by
day and by night, and as narrow as a telephone.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import grpc

from embedserve.testing.backends import FakeBackend, FaultPlan, FaultyBackend
from embedserve.testing.server import InProcessServer, serving
from embedserve.v1.embedding_pb2 import EmbedRequest
from tests.integration.http.browser import Browser

ON = {"operations.enabled": "true"}
TIGHT = {
    **ON,
    "admission.policies": "throughput,latency_p95,gradient",
    "admission.latency_p95.slo_ms": "300",
    "admission.latency_p95.hard_ms": "150",
    "admission.latency_p95.soft_ms": "60",
}
VIEWS = (("light", 1280), ("dark", 1280), ("light", 320))


async def load(server: InProcessServer, seconds: float, callers: int = 24) -> None:
    """Callers of several sizes and tenants, each of whom waits for its answer."""
    chance = random.Random(3)
    ends = time.monotonic() + seconds

    async def caller() -> None:
        while time.monotonic() < ends:
            texts = ["hello world " * chance.choice([1, 2, 3, 5, 30])] * chance.choice([1, 1, 1, 2, 4, 16])
            tenant = chance.choice(["search", "billing", "<b>bold</b>"])
            with suppress(grpc.aio.AioRpcError):
                await server.stub.Embed(
                    EmbedRequest(texts=texts), metadata=(("x-embedserve-tenant", tenant),), timeout=0.4
                )
            await asyncio.sleep(0.01)

    await asyncio.gather(*(caller() for _ in range(callers)))


async def take(browser: Browser, server: InProcessServer, path: Path) -> None:
    """The page in each view."""
    for scheme, width in VIEWS:
        async with browser.page(width, scheme=scheme) as page:
            await page.open(f"{server.operations_url}/statusz")
            await page.picture(path.with_name(f"{path.name}-{scheme}-{width}.png"))


async def main(folder: Path) -> None:
    """Four states."""
    with tempfile.TemporaryDirectory() as profile:
        async with Browser(Path(profile)) as browser:
            async with serving(settings=ON) as server:
                await take(browser, server, folder / "empty")
            slow = FakeBackend(pass_ns=lambda batch: 4_000_000 + len(batch.ids) * 60_000)
            async with serving(slow, settings=TIGHT) as server:
                busy = asyncio.create_task(load(server, 20))
                await asyncio.sleep(15)
                await take(browser, server, folder / "load")
                await busy
            plan = FaultPlan()
            async with serving(FaultyBackend(plan), settings={**ON, "health.stall_ms": "300"}) as server:
                await load(server, 2)
                plan.gate.clear()
                await load(server, 2)
                await take(browser, server, folder / "stalled")
                plan.gate.set()
            plan = FaultPlan(fail_check=True)
            plan.gate.clear()
            async with serving(FaultyBackend(plan), settings=ON, wait_ready=False) as server:
                await take(browser, server, folder / "starting")
                plan.gate.set()


if __name__ == "__main__":
    place = Path(sys.argv[1])
    place.mkdir(parents=True, exist_ok=True)
    asyncio.run(main(place))
