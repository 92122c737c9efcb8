"""The whole server in this process, without a model: gRPC on a real port, fakes where the device would be.

Decides the settings that suit a test: port 0, no telemetry, a drain that does not wait for balancers. The rest is the
composition root itself, so that what a test talks to is what runs in production.

    async with serving() as server:
        answer = await server.stub.Embed(EmbedRequest(texts=["hello world"]))

    plan = FaultPlan(fail_warm_up="no memory")
    async with serving(FaultyBackend(plan), settings={"limits.max_texts": "8"}) as server: ...
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import grpc
import grpc.aio

from embedserve.api.guard import Guard
from embedserve.api.observer import SilentCallObserver
from embedserve.app import App
from embedserve.config import load_config
from embedserve.engine.engine import Engine
from embedserve.engine.observer import SilentObserver
from embedserve.errors import StartupError
from embedserve.lifecycle import Lifecycle, State
from embedserve.telemetry.load import SharedSnapshot
from embedserve.telemetry.setup import Telemetry
from embedserve.testing.backends import FakeBackend, FaultPlan, FaultyBackend
from embedserve.testing.checkpoint import fake_checkpoint
from embedserve.v1.embedding_pb2_grpc import EmbeddingServiceStub

__all__ = ["InProcessServer", "serving"]

TEST_SETTINGS: Mapping[str, str] = {
    "server.address": "127.0.0.1:0",
    "server.uvloop": "false",
    "operations.enabled": "false",
    "operations.address": "127.0.0.1:0",
    "health.stall_ms": "60000",
    "health.hang_ms": "600000",
    "scheduling.shape": "packed",
    "tokenizer.threads": "2",
    "shutdown.settle_ms": "0",
    "shutdown.grace_ms": "5000",
}
"""What differs from production; ``settings`` of ``serving`` win. The loop is the test's own, so uvloop has no say. A
test may hold a fake's gate for longer than a device may take, above all on a busy machine."""
LIMIT_S = 10.0
"""A fake that takes longer to start or to stop hangs."""


class InProcessServer:
    """A server that runs, and a channel to it. Made by ``serving``."""

    def __init__(self, app: App, life: asyncio.Task[int], backend: FakeBackend) -> None:
        """``life`` ends with the exit code."""
        self._app = app
        self._life = life
        self.backend = backend
        """What answers."""
        self.channel = self.connect()
        """An insecure channel of this server's own."""
        # The generated stub has no annotations.
        self.stub = EmbeddingServiceStub(self.channel)  # type: ignore[no-untyped-call]

    @property
    def address(self) -> str:
        """``host:port`` or ``unix:path`` of the gRPC port."""
        return self._app.addresses[0]

    @property
    def operations_url(self) -> str:
        """The operations port, where ``operations.enabled`` is set."""
        return f"http://{self._app.operations_address}"

    @property
    def engine(self) -> Engine:
        """To look at, such as ``engine.load()``."""
        assert isinstance(self._app.engine, Engine)
        return self._app.engine

    @property
    def guard(self) -> Guard:
        """Counts the calls in flight."""
        assert self._app.guard is not None
        return self._app.guard

    @property
    def lifecycle(self) -> Lifecycle:
        """The state of the server."""
        return self._app.lifecycle

    @property
    def plan(self) -> FaultPlan:
        """What goes wrong, where the backend is a ``FaultyBackend``."""
        assert isinstance(self.backend, FaultyBackend)
        return self.backend.plan

    def connect(self) -> grpc.aio.Channel:
        """One more channel, with a connection of its own. The caller closes it."""
        return grpc.aio.insecure_channel(self.address, options=[("grpc.use_local_subchannel_pool", 1)])

    def begin_stop(self) -> None:
        """Drain, as on SIGTERM, without waiting for it."""
        self._app.stop()

    async def ended(self) -> int:
        """The exit code that the process would have, once it has ended."""
        async with asyncio.timeout(LIMIT_S):
            return await asyncio.shield(self._life)


@asynccontextmanager
async def serving(
    backend: FakeBackend | None = None,
    *,
    settings: Mapping[str, str] | None = None,
    telemetry: Telemetry | None = None,
    wait_ready: bool = True,
) -> AsyncIterator[InProcessServer]:
    """Serve ``backend`` over the tiny tokenizer until the end of the block, then drain.

    ``settings`` maps paths of settings to their text, as flags do. ``telemetry`` is silent unless given. With
    ``wait_ready`` false the block begins when the port is open and the model may still be loading. Raises
    ``ConfigError``, or ``StartupError`` when the start fails.
    """
    backend = backend or FakeBackend()
    config = load_config({**TEST_SETTINGS, **(settings or {})}, {}, on_this_machine=False).config
    app = App(
        config,
        make_backend=lambda _checkpoint: lambda: backend,
        checkpoint=fake_checkpoint(backend.identity),
        telemetry=telemetry or _silent(),
    )
    reached = asyncio.Event()
    awaited = State.SERVING if wait_ready else State.WARMING
    app.lifecycle.listen(lambda state: reached.set() if state is awaited else None)
    life = asyncio.get_running_loop().create_task(_live(app))
    life.add_done_callback(lambda _task: reached.set())
    server: InProcessServer | None = None
    try:
        async with asyncio.timeout(LIMIT_S):
            await reached.wait()
        if life.done():
            raise StartupError(f"the server ended with {life.result()} before it was {awaited.value}")
        server = InProcessServer(app, life, backend)
        yield server
    finally:
        if isinstance(backend, FaultyBackend):
            backend.plan.gate.set()
        if server is not None:
            await server.channel.close()
        app.stop()
        async with asyncio.timeout(LIMIT_S):
            await life


async def _live(app: App) -> int:
    code = await app.live(lambda _line: None)
    await app.close()
    return code


def _silent() -> Telemetry:
    return Telemetry(
        engine_observer=SilentObserver(),
        call_observer=SilentCallObserver(),
        render_metrics=None,
        snapshot=SharedSnapshot(),
        gauges=None,
        spans=None,
        meters=None,
        shed_log=None,
    )
