"""A server in this process after which nothing may be left: no call, item, task, thread or descriptor."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from embedserve.telemetry.settings import TelemetrySettings
from embedserve.telemetry.setup import Telemetry, setup_telemetry
from embedserve.testing import FakeBackend
from embedserve.testing.server import InProcessServer, serving
from embedserve.v1 import embedding_pb2 as pb
from tests.fault.figures import Figures
from tests.integration.server.calls import LIMIT_S, until

_warm: list[bool] = []


class SoundServer:
    """A server, its metrics, and the promise that all of it is given back."""

    def __init__(self, server: InProcessServer, telemetry: Telemetry) -> None:
        self.server = server
        self._telemetry = telemetry

    async def figures(self) -> Figures:
        assert self._telemetry.render_metrics is not None
        return Figures((await asyncio.to_thread(self._telemetry.render_metrics, ""))[1].decode())

    async def settled(self) -> Figures:
        """The figures once no call is in flight and nothing waits or runs; fails when that never comes."""
        engine = self.server.engine
        await until(
            lambda: self.server.guard.in_flight == engine.requests == engine.load().queue_depth
            == engine.load().running_items == 0
        )  # fmt: skip
        found = await self.figures()
        found.assert_balanced()
        return found


def descriptors() -> int:
    """Connections, listening sockets and files. gRPC keeps wakeup pairs of its own for each event loop until all of
    its objects are collected, so unix sockets and event descriptors are left out."""
    inet = {line.split()[9] for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]}
    count = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the one that lists them
            target = str(descriptor.readlink())
            count += target.startswith("/") or (target.startswith("socket:") and target[8:-1] in inet)
    return count


def threads_of_ours() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("embedserve")}


@asynccontextmanager
async def sound(
    backend: FakeBackend | None = None, *, settings: Mapping[str, str] | None = None
) -> AsyncIterator[SoundServer]:
    """``serving`` with real metrics. What is left when the block ends well, at the end of the server's life, fails."""
    if not _warm:  # what gRPC opens once in a process and keeps
        async with serving() as first:
            await first.stub.Embed(pb.EmbedRequest(texts=["warm"]))
        _warm.append(True)
    tasks, opened = asyncio.all_tasks(), descriptors()
    telemetry = setup_telemetry(TelemetrySettings(log_level="critical", log_requests="off"))
    async with serving(backend, settings=settings, telemetry=telemetry) as server:
        made = SoundServer(server, telemetry)
        yield made
        await made.settled()
    await until(lambda: not threads_of_ours(), LIMIT_S)
    await until(lambda: asyncio.all_tasks() <= tasks, LIMIT_S)
    await until(lambda: descriptors() <= opened, LIMIT_S)
