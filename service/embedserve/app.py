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
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import grpc.aio
import orjson
import structlog

from embedserve.address import bound_addresses
from embedserve.api.door import Door
from embedserve.api.embedding import SERVICE, EmbeddingServicer
from embedserve.api.guard import Guard
from embedserve.api.health import HealthService
from embedserve.api.reflection import add_reflection
from embedserve.api.server import bind, build_server
from embedserve.config import Config
from embedserve.drain import drain_calls
from embedserve.engine.surface import EngineSurface
from embedserve.errors import EmbedServeError, EngineFailed, NotServing, StartupError
from embedserve.http.operations import OperationsPort
from embedserve.lifecycle import ExitCode, Lifecycle, State
from embedserve.load_snapshot import load_snapshot
from embedserve.main_loop import read_on_loop, run_app
from embedserve.model.backend import BackendFactory, DeviceReport
from embedserve.model.checkpoint import Checkpoint
from embedserve.page import Page
from embedserve.part import WHOLE, Part
from embedserve.ready_line import ready_facts, write_ready_line
from embedserve.stop_signal import StopSignals
from embedserve.telemetry.load import LoadSnapshot
from embedserve.telemetry.logs import flush_lines
from embedserve.telemetry.setup import Telemetry, setup_telemetry
from embedserve.telemetry.withholding import without_messages
from embedserve.wiring import (
    EngineMaker,
    bucket_edges,
    build_engine,
    read_checkpoint,
    server_options,
    servicer_settings,
    telemetry_settings,
)

__all__ = ["App", "run"]

FATAL_ANSWER_S = 1.0
"""After a broken invariant: time for those in flight to be told INTERNAL before the process ends."""
WORKER_STOP_S = 5.0
"""Time for the pass that runs to end when the process stops. A pass takes milliseconds."""


class _Parts(NamedTuple):
    """What a life is led with."""

    server: grpc.aio.Server
    servicer: EmbeddingServicer
    health: HealthService
    guard: Guard
    engine: EngineSurface
    operations: OperationsPort


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
        StopSignals(self._stop.set, self._stop_at_once).listen()

    def _read_checkpoint(self) -> Checkpoint:
        return self._checkpoint or read_checkpoint(self._config)

    async def _serve(
        self, telemetry: Telemetry, checkpoint: Checkpoint, started: int, ready_line: Callable[[bytes], None]
    ) -> int:
        config, lifecycle = self._config, self.lifecycle
        for note in checkpoint.notes:
            self._log.info("checkpoint_note", note=note)
        try:
            parts = self._build(telemetry, checkpoint)
        except StartupError as error:
            self._log.critical("start_failed", reason=str(error))
            return ExitCode.START_FAILED
        try:
            await self._open(parts)
            lifecycle.to(State.WARMING)
            await self._start_engine(parts.engine)
        except StartupError as error:
            self._log.critical("start_failed", reason=str(error))
            lifecycle.to(State.FAILED)
            await parts.server.stop(None)
            self.worker_ended = await parts.engine.stop(0.0)
            await parts.operations.stop()
            return lifecycle.exit_code
        if not self._stop.is_set():
            parts.servicer.attach(parts.engine, bucket_edges(config, checkpoint))
            if parts.engine.unread is not None:
                parts.guard.door = Door(
                    parts.engine.unread,
                    max_request_ms=config.server.max_request_ms,
                    max_tenant_bytes=config.limits.max_tenant_bytes,
                )
            telemetry.register_model(parts.engine.identity)
            lifecycle.to(State.SERVING)
            parts.health.set_serving(True)
            self._announce(ready_line, parts.engine, started)
        await self._stop.wait()
        return await self._shut_down(parts)

    def _build(self, telemetry: Telemetry, checkpoint: Checkpoint) -> _Parts:
        """Every part, none of which has begun. Raises ``StartupError``."""
        config, lifecycle = self._config, self.lifecycle
        page = Page(config, checkpoint, lifecycle, self._part, lambda: self.addresses)
        call_observer, engine_observer = page.watch(telemetry.call_observer, telemetry.engine_observer)
        servicer = EmbeddingServicer(servicer_settings(config), self._internal_error)
        health = self._health = HealthService((SERVICE,))
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
        engine = self.engine = self._make_engine(
            config,
            checkpoint,
            engine_observer,
            self._die,
            on_stall=self._stall,
            on_recovery=self._recover,
            on_compilation=self._log_compilation,
        )
        page.attach(engine)
        operations = self._build_operations(telemetry, engine, page)
        return _Parts(server, servicer, health, guard, engine, operations)

    def _build_operations(self, telemetry: Telemetry, engine: EngineSurface, page: Page) -> OperationsPort:
        """What is asked over HTTP; where it is not opened, its metrics are shown by another process."""
        lifecycle, loop = self.lifecycle, asyncio.get_running_loop()

        def read() -> LoadSnapshot:
            return load_snapshot(engine, lifecycle.state.value, self._part.silent())

        telemetry.register_load(lambda: read_on_loop(loop, read))
        render_metrics = self._part.metrics(telemetry.render_metrics)
        if self._part.show is not None:
            self._part.show(render_metrics if self._config.telemetry.prometheus else None, page.snapshot)
        return OperationsPort(
            alive=lambda: lifecycle.alive,
            ready=lambda: lifecycle.accepting,
            load=engine.load,
            render_metrics=render_metrics if self._config.telemetry.prometheus else None,
            lifecycle_state=lambda: lifecycle.state.value,
            snapshot=page.snapshot,
        )

    async def _open(self, parts: _Parts) -> None:
        """Listen: probes must meet a server that loads. Raises ``StartupError``."""
        ports = bind(parts.server, self._listens)
        await parts.server.start()
        self.addresses = bound_addresses(self._listens, ports)
        if self._config.operations.enabled and self._part.has_device and self._part.show is None:
            self.operations_address = await parts.operations.start(self._config.operations.address)

    async def _start_engine(self, engine: EngineSurface) -> None:
        """Load and warm up, unless a signal comes first: a load cannot be interrupted, but need not be waited for."""
        start = asyncio.ensure_future(engine.start())
        stop = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait({start, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if start.done():
            start.result()

    def _announce(self, ready_line: Callable[[bytes], None], engine: EngineSurface, started: int) -> None:
        facts = ready_facts(engine.identity, self.addresses, self.operations_address, started)
        self._log.info("serving", **{k: v for k, v in facts.items() if k != "type"})
        ready_line(orjson.dumps(facts))

    # ------------------------------------------------------------------------------------------------------ shutdown

    async def _shut_down(self, parts: _Parts) -> int:
        health, guard, engine = parts.health, parts.guard, parts.engine
        config, lifecycle = self._config.shutdown, self.lifecycle
        health.enter_graceful_shutdown()
        if self._broken():
            return await self._end_broken(parts)
        served = lifecycle.state in (State.SERVING, State.STALLED, State.DRAINING)
        self.begin_drain()
        if not served:
            lifecycle.to(State.DRAINING)
        self._log.info("draining", in_flight=guard.in_flight, settle_ms=config.settle_ms, grace_ms=config.grace_ms)
        if served:
            await asyncio.sleep(config.settle_ms / 1000)
        health.close()
        cut_off = await drain_calls(parts.server, parts.guard, lambda: self._calls, config.grace_ms)
        engine.drain()
        if self._broken():
            return await self._end_broken(parts)
        # A load cannot be interrupted and holds nobody's answer, nor does a device that is silent: not waited for.
        self.worker_ended = await engine.stop(WORKER_STOP_S if served and not engine.stalled else 0.0)
        await parts.operations.stop()
        lifecycle.to(State.STOPPED)
        self._log.info("stopped", cut_off=cut_off)
        return ExitCode.GRACE_EXCEEDED if cut_off else lifecycle.exit_code

    async def _end_broken(self, parts: _Parts) -> int:
        """Nothing more will run: those in flight are told, and that is all.

        The gRPC server is not stopped: a stop says CANCELLED to the calls that it holds and no handler has seen
        (grpc#41785), which a caller takes for its own doing. A connection that ends with its process says UNAVAILABLE.
        """
        lifecycle = self.lifecycle
        if lifecycle.state is not State.FAILED:
            lifecycle.to(State.FAILED)
        self._log.critical("failed", reason=self._fatal, in_flight=parts.guard.in_flight)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FATAL_ANSWER_S):
                await parts.guard.wait_idle()
        self.worker_ended = await parts.engine.stop(0.0)
        await parts.operations.stop()
        return lifecycle.exit_code

    def _take_call(self) -> bool:
        """Whether a call may enter: until the port closes, through the settle time too, nobody is turned away.

        While the device is silent the engine refuses, with its own reason; what needs no device is answered.
        """
        self._calls += 1
        return self.lifecycle.state in (State.SERVING, State.STALLED, State.DRAINING)

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

    def _stop_at_once(self, number: signal.Signals) -> None:
        self._log.warning("stopped_at_once", signal=number.name)
        flush_lines()
        os._exit(128 + number)


def run(
    config: Config,
    *,
    make_backend: Callable[[Checkpoint], BackendFactory] | None = None,
    checkpoint: Checkpoint | None = None,
) -> int:
    """Live one life in a new event loop and return the exit code; what is given replaces what ``config`` says."""
    if config.server.frontends > 1 or len(config.model.devices) > 1:
        from embedserve.frontends.supervisor import run_processes  # noqa: PLC0415 - an option, and it imports this

        return run_processes(config, make_backend=make_backend, checkpoint=checkpoint)

    def make_app() -> App:
        app = App(config, make_backend=make_backend, checkpoint=checkpoint)
        app.handle_signals()
        return app

    return run_app(config, make_app, partial(write_ready_line, logger="embedserve.app"))
