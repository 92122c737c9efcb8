"""The composition root: builds every part, wires them, and lives the process's life.

Decides the order of start and stop, and nothing else. The only module that knows every part; nobody imports it but the
CLI.

Start: the checkpoint's metadata, telemetry, ports (NOT_SERVING: probes must meet a server that loads), the engine with
its weights and warm-up, SERVING, the ready line. Stop: NOT_SERVING, settle time for load balancers, the port closes,
calls in flight end within the grace, the engine empties, telemetry is flushed. A second signal ends the process at
once.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial

import grpc.aio
import orjson
import structlog

from embedserve.api.embedding import SERVICE, EmbeddingServicer
from embedserve.api.guard import Guard
from embedserve.api.health import HealthService
from embedserve.api.reflection import add_reflection
from embedserve.api.server import bind, build_server
from embedserve.config import Config
from embedserve.engine.engine import Engine
from embedserve.engine.surface import EngineSurface
from embedserve.errors import EmbedServeError, EngineFailed, NotServing, StartupError
from embedserve.http.operations import OperationsPort
from embedserve.lifecycle import ExitCode, Lifecycle, State
from embedserve.model.backend import BackendFactory, DeviceReport
from embedserve.model.checkpoint import Checkpoint
from embedserve.model.cores import core_count
from embedserve.part import WHOLE, Part
from embedserve.status import Status
from embedserve.telemetry.load import LoadSnapshot
from embedserve.telemetry.logs import configure_logs, flush_lines
from embedserve.telemetry.memory import pack_memory
from embedserve.telemetry.recent import Recent, RecentCalls, RecentEngine
from embedserve.telemetry.setup import Telemetry, setup_telemetry
from embedserve.telemetry.withholding import without_messages
from embedserve.wiring import (
    EngineMaker,
    bucket_edges,
    build_engine,
    load_snapshot,
    prepare_environment,
    read_checkpoint,
    server_options,
    servicer_settings,
    telemetry_settings,
)

__all__ = ["App", "run", "run_app"]

FATAL_ANSWER_S = 1.0
"""After a broken invariant: time for those in flight to be told INTERNAL before the process ends."""
WORKER_STOP_S = 5.0
"""Time for the pass that runs to end when the process stops. A pass takes milliseconds."""
CATCH_UP_S = 0.002
"""No call for so long means that gRPC holds none: handing one over takes 0.1 ms."""
CATCH_UP_MAX_S = 0.25
"""Under a load without pauses, this much longer is served and then it must end."""
STRAGGLERS_S = 1.0
"""After the last call has ended: time for one that gRPC has taken and no handler has begun. It needs milliseconds."""
COLLECTOR_THRESHOLDS = (10_000, 20, 20)
LOAD_READ_S = 2.0
"""A scrape waits for the event loop no longer than this; a loop that is stuck for longer fails the scrape, which says
so."""


class App:
    """One process's life. ``live`` returns the exit code."""

    def __init__(
        self,
        config: Config,
        *,
        make_backend: Callable[[Checkpoint], BackendFactory] | None = None,
        checkpoint: Checkpoint | None = None,
        telemetry: Telemetry | None = None,
        part: Part = WHOLE,
    ) -> None:
        """What is given replaces what ``config`` says: the torch backend, the checkpoint, telemetry.

        For tests, other devices, and programs that have telemetry of their own. ``part`` is for the processes of
        ``frontends``.
        """
        self._config = config
        self._checkpoint = checkpoint
        self._telemetry = telemetry
        self._part = part
        self._make_engine: EngineMaker = part.make_engine or partial(build_engine, make_backend=make_backend)
        self._listens = config.server.addresses if part.listens else ()
        self._stop = asyncio.Event()
        self._signals = 0
        self._calls = 0
        self._fatal: str | None = None
        self._health: HealthService | None = None
        self._server: grpc.aio.Server | None = None
        self._log = structlog.get_logger("embedserve.app")
        self.lifecycle = Lifecycle()
        """To read and to listen to; only this class changes it."""
        self.addresses: tuple[str, ...] = ()
        """Where gRPC listens, from WARMING on; port 0 is replaced by what the system chose."""
        self.operations_address: str | None = None
        """Where the operations port listens, from WARMING on."""
        self.engine: EngineSurface | None = None
        self.guard: Guard | None = None
        self.worker_ended = True
        """Whether no thread of ours is left in native code: if one is, only the system can end this process in time."""

    async def live(self, ready_line: Callable[[bytes], None]) -> int:
        """Start, serve until told to stop, drain. ``ready_line`` gets one JSON line once health says SERVING."""
        started = time.monotonic_ns()
        config = self._config
        loop = asyncio.get_running_loop()
        try:
            # In a thread, so that a SIGTERM during the digests of a large checkpoint is heard.
            checkpoint = await loop.run_in_executor(None, self._read_checkpoint)
        except StartupError as error:
            self._log.critical("start_failed", reason=str(error))
            return ExitCode.START_FAILED
        part = self._part
        telemetry = self._telemetry or setup_telemetry(
            telemetry_settings(config, checkpoint, part.role, has_device=part.has_device)
        )
        code = ExitCode.BROKEN
        try:
            code = await self._serve(telemetry, checkpoint, started, ready_line)
        finally:
            await loop.run_in_executor(None, telemetry.shutdown, config.shutdown.telemetry_flush_ms / 1000)
        return code

    async def close(self) -> None:
        """Close the port and every connection, for a process that goes on after ``live``.

        After a broken invariant they are open still: see ``_end_broken``.
        """
        if self._server is not None:
            await self._server.stop(None)

    def stop(self) -> None:
        """Drain and end, as on SIGTERM. May be called at any time."""
        self._stop.set()

    def begin_drain(self) -> None:
        """Say that nothing new is to be sent here, and serve on until ``stop``: others drain first."""
        if self.lifecycle.state in (State.SERVING, State.STALLED):
            self.lifecycle.to(State.DRAINING)

    def handle_signals(self) -> None:
        """SIGTERM and SIGINT stop this process, a second one at once. Only in the main thread's event loop."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._take_signal, number)

    def _read_checkpoint(self) -> Checkpoint:
        return self._checkpoint or read_checkpoint(self._config)

    async def _serve(
        self, telemetry: Telemetry, checkpoint: Checkpoint, started: int, ready_line: Callable[[bytes], None]
    ) -> int:
        config, lifecycle = self._config, self.lifecycle
        for note in checkpoint.notes:
            self._log.info("checkpoint_note", note=note)
        servicer = EmbeddingServicer(servicer_settings(config), self._internal_error)
        health = self._health = HealthService((SERVICE,))
        call_observer, engine_observer, status = telemetry.call_observer, telemetry.engine_observer, None
        operations_here = config.operations.enabled and self._part.has_device
        remembered = None
        if config.operations.enabled and config.operations.statusz:
            if self._part.remember is not None:
                remembered = Recent(config.tokenizer.thread_count(core_count()))
                call_observer = RecentCalls(remembered, call_observer)
                engine_observer = RecentEngine(remembered, engine_observer)
            elif operations_here:
                status = Status(config, checkpoint, lifecycle, self._shown_addresses, self._part.recall)
                call_observer, engine_observer = status.watch(call_observer, engine_observer)
        guard = self.guard = Guard(
            on_internal_error=self._internal_error,
            on_fatal=lambda error: self._die(f"{type(error).__name__}: {error}"),
            accepting=self._take_call,
            observer=call_observer,
            max_metadata_bytes=config.server.max_metadata_bytes,
        )
        server = self._server = build_server(server_options(config), [guard])
        servicer.add_to(server)
        health.add_to(server)
        if config.server.reflection:
            add_reflection(server, (SERVICE, "grpc.health.v1.Health"))
        try:
            engine = self.engine = self._make_engine(
                config,
                checkpoint,
                engine_observer,
                self._die,
                on_stall=self._stall,
                on_recovery=self._recover,
                on_compilation=self._log_compilation,
            )
        except StartupError as error:
            self._log.critical("start_failed", reason=str(error))
            return ExitCode.START_FAILED
        loop = asyncio.get_running_loop()
        telemetry.register_load(
            lambda: _on_loop(loop, lambda: load_snapshot(engine, lifecycle.state.value, self._part.silent()))
        )
        render_metrics = self._part.metrics(telemetry.render_metrics)
        operations = OperationsPort(
            alive=lambda: lifecycle.alive,
            ready=lambda: lifecycle.accepting,
            load=engine.load,
            render_metrics=render_metrics if config.telemetry.prometheus else None,
            lifecycle_state=lambda: lifecycle.state.value,
            snapshot=status.take if status is not None else None,
        )
        if remembered is not None and self._part.remember is not None:
            self._part.remember(lambda: pack_memory(remembered, engine.tokenizer_use.pending))
        if status is not None and isinstance(engine, Engine):
            status.attach(engine)
        try:
            ports = bind(server, self._listens)
            await server.start()
            self.addresses = _addresses(self._listens, ports)
            if operations_here:
                self.operations_address = await operations.start(config.operations.address)
            lifecycle.to(State.WARMING)
            await self._start_engine(engine)
        except StartupError as error:
            self._log.critical("start_failed", reason=str(error))
            lifecycle.to(State.FAILED)
            await server.stop(None)
            self.worker_ended = await engine.stop(0.0)
            await operations.stop()
            return lifecycle.exit_code
        if not self._stop.is_set():
            servicer.attach(engine, bucket_edges(config, checkpoint))
            telemetry.register_model(engine.identity)
            lifecycle.to(State.SERVING)
            health.set_serving(True)
            self._announce(ready_line, engine, started)
        await self._stop.wait()
        return await self._shut_down(server, health, guard, operations, engine)

    async def _start_engine(self, engine: EngineSurface) -> None:
        """Load and warm up, unless a signal comes first: a load cannot be interrupted, but need not be waited for."""
        start = asyncio.ensure_future(engine.start())
        stop = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait({start, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if start.done():
            start.result()

    def _shown_addresses(self) -> tuple[str, ...]:
        return self.addresses if self._part.listens else self._config.server.addresses

    def _announce(self, ready_line: Callable[[bytes], None], engine: EngineSurface, started: int) -> None:
        identity = engine.identity
        facts = {
            "type": "ready",
            "address": self.addresses[0] if self.addresses else None,
            "addresses": self.addresses,
            "operations": self.operations_address,
            "model": identity.name,
            "revision": identity.revision,
            "dimension": identity.dimension,
            "max_input_length": identity.max_input_length,
            "dtype": identity.dtype,
            "device": identity.device,
            "startup_ms": round((time.monotonic_ns() - started) / 1e6),
            "pid": os.getpid(),
        }
        self._log.info("serving", **{k: v for k, v in facts.items() if k != "type"})
        ready_line(orjson.dumps(facts))

    # ------------------------------------------------------------------------------------------------------ shutdown

    async def _shut_down(
        self,
        server: grpc.aio.Server,
        health: HealthService,
        guard: Guard,
        operations: OperationsPort,
        engine: EngineSurface,
    ) -> int:
        config, lifecycle = self._config.shutdown, self.lifecycle
        health.enter_graceful_shutdown()
        if self._broken():
            return await self._end_broken(guard, operations, engine)
        served = lifecycle.state in (State.SERVING, State.STALLED, State.DRAINING)
        self.begin_drain()
        if not served:
            lifecycle.to(State.DRAINING)
        self._log.info("draining", in_flight=guard.in_flight, settle_ms=config.settle_ms, grace_ms=config.grace_ms)
        if served:
            await asyncio.sleep(config.settle_ms / 1000)
        health.close()
        cut_off = await self._drain(server, guard, engine)
        if self._broken():
            return await self._end_broken(guard, operations, engine)
        # A load cannot be interrupted and holds nobody's answer, nor does a device that is silent: not waited for.
        self.worker_ended = await engine.stop(WORKER_STOP_S if served and not engine.stalled else 0.0)
        await operations.stop()
        lifecycle.to(State.STOPPED)
        self._log.info("stopped", cut_off=cut_off)
        return ExitCode.GRACE_EXCEEDED if cut_off else lifecycle.exit_code

    async def _end_broken(self, guard: Guard, operations: OperationsPort, engine: EngineSurface) -> int:
        """Nothing more will run: those in flight are told, and that is all.

        The gRPC server is not stopped: a stop says CANCELLED to the calls that it holds and no handler has seen
        (grpc#41785), which a caller takes for its own doing. A connection that ends with its process says UNAVAILABLE.
        """
        lifecycle = self.lifecycle
        if lifecycle.state is not State.FAILED:
            lifecycle.to(State.FAILED)
        self._log.critical("failed", reason=self._fatal, in_flight=guard.in_flight)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FATAL_ANSWER_S):
                await guard.wait_idle()
        self.worker_ended = await engine.stop(0.0)
        await operations.stop()
        return lifecycle.exit_code

    def _take_call(self) -> bool:
        """Whether a call may enter: until the port closes, through the settle time too, nobody is turned away.

        While the device is silent the engine refuses, with its own reason; what needs no device is answered.
        """
        self._calls += 1
        return self.lifecycle.state in (State.SERVING, State.STALLED, State.DRAINING)

    async def _caught_up(self) -> None:
        """Wait for a moment in which gRPC holds no call that no handler has seen: a stop ends those with CANCELLED.

        grpc#41785. There is no such moment under a load that never pauses; then the wait is bounded.
        """
        ends = time.monotonic() + CATCH_UP_MAX_S
        seen = -1
        while seen != self._calls and time.monotonic() < ends:
            seen = self._calls
            await asyncio.sleep(CATCH_UP_S)

    async def _drain(self, server: grpc.aio.Server, guard: Guard, engine: EngineSurface) -> int:
        """Let calls in flight end within the grace; returns how many were cut off."""
        grace_s = self._config.shutdown.grace_ms / 1000
        await self._caught_up()
        stopping = asyncio.ensure_future(server.stop(grace_s))
        cut_off = 0
        try:
            async with asyncio.timeout(grace_s):
                await guard.wait_idle()
        except TimeoutError:
            cut_off = guard.in_flight
            self._log.error("grace_exceeded", cut_off=cut_off, grace_ms=self._config.shutdown.grace_ms)
        # The engine takes calls until the server has none: gRPC may hold one that no handler has seen yet. Streams of
        # reflection have nothing to lose, and must not hold the exit for the whole grace.
        await server.stop(min(grace_s, STRAGGLERS_S))
        await stopping
        engine.drain()
        return cut_off

    def _internal_error(self, error_id: str, error: BaseException) -> None:
        """The client has the id; the log has the rest."""
        known = isinstance(error, (EngineFailed, NotServing))
        self._log.error(
            "internal_error",
            error_id=error_id,
            error_type=type(error).__name__,
            error=str(error) if isinstance(error, EmbedServeError) else None,
            exc_info=None if known else without_messages(error),
        )

    def _broken(self) -> bool:
        return self._fatal is not None

    def _die(self, why: str) -> None:
        """Nothing more will run: say so, then end, once."""
        if self._fatal is None:
            self._fatal = why
            if self._health is not None:
                self._health.enter_graceful_shutdown()
            if self.lifecycle.state in (State.SERVING, State.STALLED, State.DRAINING):
                self.lifecycle.to(State.FAILED)
            self._stop.set()

    def _stall(self, age_ns: int) -> None:
        """The device is silent. It may come back, and then so do we."""
        self._log.error("stalled", pass_age_ms=round(age_ns / 1e6), stall_ms=self._config.health.stall_ms)
        if self.lifecycle.state is State.SERVING:
            self.lifecycle.to(State.STALLED)
            if self._health is not None:
                self._health.set_serving(False)

    def _recover(self, lasted_ns: int) -> None:
        self._log.warning("recovered", stalled_ms=round(lasted_ns / 1e6))
        if self.lifecycle.state is State.STALLED:
            self.lifecycle.to(State.SERVING)
            if self._health is not None:
                self._health.set_serving(True)

    def _log_compilation(self, report: DeviceReport) -> None:
        took_ms = round(report.compile_s * 1000)
        if report.compiled:
            self._log.info("compiled", compile_ms=took_ms, cached=report.compile_cached)
        else:
            self._log.info("not_compiled", reason=report.compile_failure)

    def _take_signal(self, number: signal.Signals) -> None:
        self._signals += 1
        if self._signals > 1:
            self._log.warning("stopped_at_once", signal=number.name)
            flush_lines()
            os._exit(128 + number)
        self._stop.set()


def _addresses(asked: tuple[str, ...], ports: list[int]) -> tuple[str, ...]:
    """The addresses as they are: port 0 replaced by what the system chose."""
    return tuple(
        address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}"
        for address, port in zip(asked, ports, strict=True)
    )


def _on_loop(loop: asyncio.AbstractEventLoop, read: Callable[[], LoadSnapshot]) -> LoadSnapshot:
    """Read on the loop's own thread: reading prunes windows, which must not happen beside an append (coral's D15)."""

    async def on_loop() -> LoadSnapshot:
        return read()

    if loop.is_closed():
        return LoadSnapshot(lifecycle_state=State.STOPPED.value)
    return asyncio.run_coroutine_threadsafe(on_loop(), loop).result(LOAD_READ_S)


def run(
    config: Config,
    *,
    make_backend: Callable[[Checkpoint], BackendFactory] | None = None,
    checkpoint: Checkpoint | None = None,
) -> int:
    """Live one life in a new event loop and return the exit code; what is given replaces what ``config`` says."""
    if config.server.frontends > 1:
        from embedserve.frontends.supervisor import run_processes  # noqa: PLC0415 - an option, and it imports this

        return run_processes(config, make_backend=make_backend, checkpoint=checkpoint)

    def ready_line(line: bytes) -> None:
        # Not through the interpreter's buffer: what cannot be written would fail its end, and the exit code with it.
        try:
            os.write(sys.stdout.fileno(), line + b"\n")
        except (OSError, AttributeError) as error:  # a full disk, a reader that has gone, a closed standard output
            structlog.get_logger("embedserve.app").warning("ready_line_lost", reason=str(error))

    def make_app() -> App:
        app = App(config, make_backend=make_backend, checkpoint=checkpoint)
        app.handle_signals()
        return app

    return run_app(config, make_app, ready_line)


def run_app(config: Config, make_app: Callable[[], App], ready_line: Callable[[bytes], None]) -> int:
    """Live the life of the app that ``make_app`` makes in a new event loop, which runs then; its exit code."""
    prepare_environment()
    telemetry = config.telemetry
    # Before anything can fail: until then structlog writes to standard output, which belongs to the ready line.
    configure_logs(level=telemetry.log_level, levels=telemetry.log_levels, form=telemetry.log_format)

    def ready(line: bytes) -> None:
        _settle_collector()
        ready_line(line)

    async def live() -> tuple[int, bool]:
        app = make_app()
        code = await app.live(ready)
        if code == ExitCode.BROKEN:
            flush_lines()
            os._exit(code)  # with connections still open, so that who is on the way is not told CANCELLED
        return code, app.worker_ended

    with asyncio.Runner(loop_factory=_loop_factory(config)) as runner:
        code, worker_ended = runner.run(live())
    if not worker_ended:
        # A thread that is stuck in native code, or still imports torch, would hold the interpreter's end for seconds.
        os._exit(code)
    return code


def _settle_collector() -> None:
    """Let the collector of cycles look at what requests leave, and not at the modules and the model again and again.

    Modules and model live as long as the process does. Python looks at the young objects after each 700; a request
    makes some hundred, and 64 callers more than that between two answers.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECTOR_THRESHOLDS)


def _loop_factory(config: Config) -> Callable[[], asyncio.AbstractEventLoop]:
    if not config.server.uvloop:
        return asyncio.new_event_loop
    import uvloop  # noqa: PLC0415 - an option

    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
