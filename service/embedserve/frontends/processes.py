"""What runs in each process: the whole life of ``app.App``, around another engine or without a port.

Decides which settings differ between them. Must never know how they are started or ended: the supervisor says "stop"
over a socket, and its own end means the same, but that the engine process must then see for itself that its front ends
have gone. Signals are the supervisor's: a service manager sends SIGTERM to all processes at once, and an engine that
stopped before its front ends would cut their calls off.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.reduction import DupFd
from typing import Any, Final

import orjson
import structlog

from embedserve.app import App
from embedserve.config import Config
from embedserve.engine.engine import Engine
from embedserve.engine.observer import EngineObserver
from embedserve.engine.stream import piece_items
from embedserve.frontends import frames
from embedserve.frontends.engines import Place
from embedserve.frontends.host import ASK_S, Ends, EngineHost
from embedserve.frontends.remote import RemoteEngine, RemoteSettings
from embedserve.lifecycle import ExitCode, State
from embedserve.main_loop import run_app
from embedserve.model.backend import BackendFactory, DeviceReport
from embedserve.model.checkpoint import Checkpoint
from embedserve.part import Memories, Part, Render
from embedserve.snapshot import Snapshot
from embedserve.telemetry.exposition import merge_expositions
from embedserve.telemetry.handles import SpanHandles
from embedserve.telemetry.logs import name_process
from embedserve.wiring import build_engine, stall_limits, tokenizer_settings

__all__ = [
    "ALONE",
    "DRAIN",
    "STOP",
    "WITH_FRONT_ENDS",
    "Descriptor",
    "EngineProcess",
    "FrontEndProcess",
    "memory_bytes",
]

STOP = b"s"
"""The supervisor says: drain and end. Its own end means the same."""
ORPHAN_MARGIN_S: Final = 2.0
"""Beyond their settling and their grace: front ends whose supervisor has gone leave the engine by themselves."""
WITH_FRONT_ENDS, ALONE = b"\1", b"\0"
"""Which metrics are asked for: of an engine process and all front ends, or of it alone; then the Accept header."""
DRAIN = b"d"
"""The supervisor says: others drain. Say so to who asks, and serve on."""


class Descriptor:
    """A file descriptor on its way into a process that is being spawned: there, an ``int``."""

    def __init__(self, number: int) -> None:
        """Of this process; whoever made it closes it."""
        self.number = number

    def __reduce__(self) -> tuple[Callable[[Any], int], tuple[Any]]:
        """As a descriptor that the child inherits."""
        return _detach, (DupFd(self.number),)


def _detach(inherited: Any) -> int:
    number: int = inherited.detach()
    return number


def memory_bytes(config: Config) -> int:
    """``server.frontend_memory_bytes``, rounded down to a power of two."""
    return 1 << (config.server.frontend_memory_bytes.bit_length() - 1)


@dataclass(frozen=True)
class FrontEndProcess:
    """One front end: gRPC, validation, tokenising, encoding, telemetry of calls."""

    config: Config
    checkpoint: Checkpoint
    role: str
    control: Descriptor
    links: Sequence[tuple[str, Descriptor, Descriptor]]
    """Name, link and memory of each engine."""
    place: Place

    def __call__(self) -> None:
        """Live, and end this process."""
        _live(self.config, self.role, self.control, self._make_app)

    def _make_app(self) -> App:
        made: list[RemoteEngine] = []
        apps: list[App] = []

        def keep(render: Render) -> Render:
            """The engine process asks for them."""
            made[0].render_metrics = render
            return render

        def remember(recall: Callable[[], bytes]) -> None:
            """It asks for them too."""
            made[0].recall = recall

        part = Part(
            self.role,
            make_engine=partial(self._make_engine, made, apps),
            has_device=False,
            silent=lambda: made[0].engines.silent,
            metrics=keep,
            remember=remember,
        )
        apps.append(App(self.config, checkpoint=self.checkpoint, part=part))
        return apps[0]

    def _make_engine(
        self,
        made: list[RemoteEngine],
        apps: list[App],
        config: Config,
        checkpoint: Checkpoint,
        observer: EngineObserver,
        on_fatal: Callable[[str], None],
        *,
        on_stall: Callable[[int], None],
        on_recovery: Callable[[int], None],
        on_compilation: Callable[[DeviceReport], None],  # noqa: ARG002 - the engine process tells
    ) -> RemoteEngine:
        log = structlog.get_logger("embedserve.frontends")

        def tell_of_engine(event: str, facts: Mapping[str, object]) -> None:
            if event == "engine_silent":
                log.error("engine_silent", **facts)
            elif event == "engine_back":
                log.warning("engine_back", **facts)
            else:
                log.error("engine_lost", **facts)
                for app in apps:  # whether its process has ended or only our way to it: half a service is none
                    app.stop()

        engine = RemoteEngine(
            [Ends(name, _number(link), _number(memory)) for name, link, memory in self.links],
            tokenizer=checkpoint.tokenizer(),
            settings=RemoteSettings(
                tokenizer=tokenizer_settings(config),
                max_requests_in_flight=config.limits.max_requests_in_flight,
                piece_items=piece_items(config.server.stream_window_items),
                memory_bytes=memory_bytes(config),
                stall=stall_limits(config),
                place=self.place,
            ),
            observer=observer,
            traces=SpanHandles(),
            on_fatal=on_fatal,
            on_stall=on_stall,
            on_recovery=on_recovery,
            on_engine=tell_of_engine,
        )
        made.append(engine)
        return engine


@dataclass(frozen=True)
class EngineProcess:
    """The engine: scheduler, driver, worker, canary, watchdog, and the operations port of all processes."""

    config: Config
    checkpoint: Checkpoint
    role: str
    control: Descriptor
    links: Sequence[tuple[str, Descriptor, Descriptor | None]]
    """Name, link and memory of each front end; without memory, of the supervisor, which then shows what is asked over
    HTTP: an engine process that stands still must not take the others' probes with it."""
    make_backend: Callable[[Checkpoint], BackendFactory] | None

    def __call__(self) -> None:
        """Live, and end this process."""
        hosts: list[EngineHost] = []

        async def outlast() -> None:
            """Front ends drain by themselves where the supervisor has gone: their calls want their vectors."""
            shutdown = self.config.shutdown
            for host in hosts:
                await host.desert((shutdown.settle_ms + shutdown.grace_ms) / 1000 + ORPHAN_MARGIN_S)

        _live(self.config, self.role, self.control, partial(self._make_app, hosts), outlast)

    def _make_app(self, hosts: list[EngineHost]) -> App:

        def merge(render: Render) -> Render:
            return None if render is None else partial(_scrape, self.role, render, hosts[0], asyncio.get_running_loop())

        async def recall() -> Memories:
            return Memories(*await hosts[0].ask(frames.RECALL))

        def show(render: Render, take: Callable[[], Awaitable[Snapshot]] | None) -> None:
            hosts[0].show = partial(_show, self.role, render, take, hosts[0])

        shown_elsewhere = any(memory is None for _, _, memory in self.links)
        part = Part(
            self.role,
            make_engine=partial(self._make_engine, hosts),
            listens=False,
            metrics=(lambda render: render) if shown_elsewhere else merge,
            show=show if shown_elsewhere else None,
            silent=lambda: hosts[0].silent,
            recall=recall,
        )
        app = App(self.config, checkpoint=self.checkpoint, part=part)

        def follow(state: State) -> None:
            """The model is ready: its front ends are heard from now on, and told."""
            if state is State.SERVING:
                for host in hosts:
                    host.open()

        app.lifecycle.listen(follow)
        return app

    def _make_engine(
        self,
        hosts: list[EngineHost],
        config: Config,
        checkpoint: Checkpoint,
        observer: EngineObserver,
        on_fatal: Callable[[str], None],
        *,
        on_stall: Callable[[int], None],
        on_recovery: Callable[[int], None],
        on_compilation: Callable[[DeviceReport], None],
    ) -> Engine:

        def die(why: str) -> None:
            for host in hosts:
                host.tell_broken(why)
            on_fatal(why)

        def tell_load() -> None:
            for host in hosts:
                host.tell_load()

        def stall(age_ns: int) -> None:
            on_stall(age_ns)
            tell_load()

        def recover(lasted_ns: int) -> None:
            on_recovery(lasted_ns)
            tell_load()

        engine = build_engine(
            config,
            checkpoint,
            observer,
            die,
            on_stall=stall,
            on_recovery=recover,
            on_compilation=on_compilation,
            make_backend=self.make_backend,
        )
        ends = [
            Ends(name, _number(link), None if memory is None else _number(memory)) for name, link, memory in self.links
        ]
        stall_ns = stall_limits(config).stall_ns
        hosts.append(EngineHost(engine, SpanHandles(), ends, on_fatal=die, stall_ns=stall_ns))
        return engine


def _scrape(
    role: str,
    render: Callable[[str], tuple[str, bytes]],
    host: EngineHost,
    loop: asyncio.AbstractEventLoop,
    accept_header: str,
) -> tuple[str, bytes]:
    """The metrics of all processes that answer, in a scraper's thread. This one's own, taken last, say who does not."""
    asked = asyncio.run_coroutine_threadsafe(host.ask(frames.SCRAPE, _as_sent(accept_header)), loop)
    others = asked.result(2 * ASK_S).given
    content_type, own = render(accept_header)
    return content_type, merge_expositions([(role, own), *others])


async def _show(
    role: str,
    render: Render,
    take: Callable[[], Awaitable[Snapshot]] | None,
    host: EngineHost,
    kind: int,
    body: bytes,
) -> bytes:
    """What the supervisor shows over HTTP: the page's facts, or the metrics of this process, or of front ends too."""
    if kind == frames.SHOW_PAGE:
        assert take is not None, "not asked where there is no page"
        return orjson.dumps(await take())
    assert render is not None, "not asked where metrics are off"
    others: list[tuple[str, bytes]] = []
    if body[:1] == WITH_FRONT_ENDS:
        others = (await host.ask(frames.SCRAPE, body[1:])).given
    else:
        host.forget_silent()
    loop, accept_header = asyncio.get_running_loop(), body[1:].decode(errors="surrogateescape")
    content_type, own = await loop.run_in_executor(None, render, accept_header)
    return content_type.encode() + b"\n" + merge_expositions([(role, own), *others])


def _as_sent(header: str) -> bytes:
    """The bytes of a header: those that are no UTF-8 are surrogates in its text."""
    return header.encode(errors="surrogateescape")


def _number(descriptor: Descriptor) -> int:
    """In the child, unpickling has made an ``int`` of it."""
    assert isinstance(descriptor, int), "only in the process that was spawned"
    return descriptor


async def _at_once() -> None:
    """Nobody is waited for."""


def _live(
    config: Config,
    role: str,
    control: Descriptor,
    make_app: Callable[[], App],
    outlast: Callable[[], Coroutine[Any, Any, None]] = _at_once,
) -> None:
    """The life of one process, and its end with the exit code; ``outlast`` comes before it without a supervisor."""
    name_process(role)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    wire = socket.socket(fileno=_number(control))
    wire.setblocking(False)

    def make() -> App:
        app = make_app()
        orphaned: list[asyncio.Task[None]] = []

        async def end_alone() -> None:
            app.begin_drain()
            await outlast()
            app.stop()

        def hear() -> None:
            try:
                heard = wire.recv(64)
            except ConnectionError:
                heard = b""
            if DRAIN in heard:
                app.begin_drain()
            if STOP in heard:
                asyncio.get_running_loop().remove_reader(wire)
                app.stop()
            elif not heard:
                asyncio.get_running_loop().remove_reader(wire)
                orphaned.append(asyncio.get_running_loop().create_task(end_alone()))

        asyncio.get_running_loop().add_reader(wire, hear)
        return app

    def ready(line: bytes) -> None:
        wire.send(line + b"\n")

    code = ExitCode.BROKEN
    try:
        code = run_app(config, make, ready)
    finally:
        os._exit(code)  # nothing of multiprocessing's own end is of use here, and threads may hold it up
