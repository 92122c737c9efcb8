"""Starts the engine processes and the front ends, and ends them in the right order.

Decides who is told to stop when, and what the exit code of all of them together is. Must never know a call. It imports
what a front end does and computes nothing: it is there so that a process that dies, by a signal even, is answered for.

Start: the checkpoint's metadata is read and the port held, once; then all processes start beside each other, and the
ready line is printed when each of them is ready. Stop: the front ends drain, and only when the last of them has ended
the engine processes. When any process ends that was not told to, the others drain and the exit code is 70: it is not
started anew, because its end is a fault of ours (or of the machine's memory) that an orchestrator must see, and a
deployment that is half itself is harder to reason about than one that restarts. Of several engines the same holds: the
others answer what they have while the front ends drain.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.context import SpawnProcess
from typing import Any, Final

import orjson
import structlog

from embedserve.config import Config
from embedserve.errors import StartupError
from embedserve.frontends.engines import Place
from embedserve.frontends.memory import create_memory
from embedserve.frontends.operations import Operations
from embedserve.frontends.ports import hold_ports
from embedserve.frontends.processes import DRAIN, STOP, Descriptor, EngineProcess, FrontEndProcess, memory_bytes
from embedserve.lifecycle import ExitCode, State
from embedserve.model.backend import BackendFactory
from embedserve.model.checkpoint import Checkpoint
from embedserve.model.cores import core_count
from embedserve.ready_line import write_ready_line
from embedserve.stop_signal import StopSignals
from embedserve.telemetry.logs import configure_logs
from embedserve.wiring import prepare_environment, read_checkpoint

__all__ = ["Supervisor", "run_processes"]

END_MARGIN_S: Final = 10.0
"""Beyond the grace and the flush: a process that takes longer to end hangs, and is killed."""
START_END_S: Final = 5.0
"""A process that has not started yet holds nobody's answer: it is not waited for any longer."""


@dataclass
class _Child:
    """A process, and the socket to tell it things."""

    role: str
    process: SpawnProcess
    control: socket.socket
    engine: bool
    ready: dict[str, Any] | None = None
    heard: bytes = b""


class Supervisor:
    """The life of all processes. ``live`` returns the exit code."""

    def __init__(
        self,
        config: Config,
        *,
        make_backend: Callable[[Checkpoint], BackendFactory] | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """As ``app.App``; what is given must be picklable."""
        self._config = config
        self._make_backend = make_backend
        self._checkpoint = checkpoint
        self._children: list[_Child] = []
        self._running: set[str] = set()
        self._log = structlog.get_logger("embedserve.supervisor")
        self._stop = asyncio.Event()
        self._changed = asyncio.Event()
        self._verdict: int | None = None
        """What came before anybody was told to stop."""
        self._codes: list[int] = []
        self._operations: Operations | None = None
        """Where there are several engines; otherwise the one engine process does that."""
        self._operations_address: str | None = None

    async def live(self, ready_line: Callable[[bytes], None]) -> int:
        """Start, serve until told to stop or one process ends, and end all."""
        started = time.monotonic_ns()
        loop = asyncio.get_running_loop()
        StopSignals(self._take_stop, self._stop_at_once).listen()
        try:
            checkpoint = await loop.run_in_executor(None, self._read_checkpoint)
            held, addresses = hold_ports(self._config.server.addresses, shared=self._config.server.so_reuseport)
        except StartupError as error:
            self._log.critical("start_failed", reason=str(error))
            return ExitCode.START_FAILED
        try:
            if len(self._config.model.devices) > 1:
                await self._watch_engines()
            if not self._stop.is_set():
                self._start(checkpoint, addresses)
            await self._until(lambda: self._stop.is_set() or self._ready)
            if not self._stop.is_set():
                ready_line(self._facts(addresses, started))
            await self._stop.wait()
            return await self._end()
        except StartupError as error:
            self._log.critical("start_failed", reason=str(error))
            return ExitCode.START_FAILED
        finally:
            if self._operations is not None:
                await self._operations.close()
            for child in self._children:
                if child.role in self._running:
                    child.process.kill()
            for one in held:
                one.close()

    # -------------------------------------------------------------------------------------------------------- start

    def _read_checkpoint(self) -> Checkpoint:
        return self._checkpoint or read_checkpoint(self._config)

    async def _watch_engines(self) -> None:
        self._operations = Operations(
            self._config, state=lambda: self._state, on_hung=self._end_hung, on_change=self._changed.set
        )
        self._operations_address = await self._operations.open()

    @property
    def _ready(self) -> bool:
        engines = self._operations is None or self._operations.ready
        return engines and all(child.ready for child in self._children)

    @property
    def _state(self) -> State:
        """Of all of them, as far as processes can tell."""
        if self._verdict == ExitCode.BROKEN:
            return State.FAILED
        if self._stop.is_set():
            return State.DRAINING
        return State.SERVING if self._ready else State.STARTING

    def _start(self, checkpoint: Checkpoint, addresses: tuple[str, ...]) -> None:
        front_ends = [f"frontend-{number}" for number in range(self._config.server.frontends)]
        settings = engine_settings(self._config, addresses)
        ends = _Ends(front_ends, list(settings), memory_bytes(self._config))
        front_config = front_end_settings(self._config, addresses)
        for number, role in enumerate(front_ends):
            place = Place(number, len(front_ends))
            self._spawn(role, lambda control, role=role, place=place: FrontEndProcess(  # type: ignore[misc]
                front_config, checkpoint, role, control, ends.of_front_end[role], place
            ))  # fmt: skip
        for role, config in settings.items():
            links: list[tuple[str, Descriptor, Descriptor | None]] = [*ends.of_engine[role]]
            if self._operations is not None:
                ours, engines = socket.socketpair()
                self._operations.watch(role, ours.detach())
                links.append(("supervisor", ends.keep(engines.detach()), None))
            self._spawn(role, lambda control, role=role, config=config, links=links: EngineProcess(  # type: ignore[misc]
                config, checkpoint, role, control, links, self._make_backend
            ), engine=True)  # fmt: skip
        ends.close()

    def _spawn(self, role: str, make: Callable[[Descriptor], Callable[[], None]], *, engine: bool = False) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        process = multiprocessing.get_context("spawn").Process(
            target=make(Descriptor(theirs.fileno())), name=f"embedserve-{role}", daemon=False
        )
        process.start()
        theirs.close()
        child = _Child(role, process, ours, engine)
        self._children.append(child)
        self._running.add(role)
        loop = asyncio.get_running_loop()
        loop.add_reader(ours, self._hear, child)
        loop.add_reader(process.sentinel, self._ended, child)

    def _hear(self, child: _Child) -> None:
        try:
            heard = child.control.recv(65536)
        except ConnectionError:
            heard = b""
        if not heard:
            asyncio.get_running_loop().remove_reader(child.control)
            return
        child.heard += heard
        line, newline, _ = child.heard.partition(b"\n")
        if newline and child.ready is None:
            child.ready = orjson.loads(line)
            self._changed.set()

    def _facts(self, addresses: tuple[str, ...], started: int) -> bytes:
        ready = [child.ready for child in self._children if child.engine and child.ready is not None]
        facts = ready[0] | {
            "device": ",".join(one["device"] for one in ready),
            "operations": self._operations_address or ready[0]["operations"],
            "address": addresses[0],
            "addresses": addresses,
            "startup_ms": round((time.monotonic_ns() - started) / 1e6),
            "pid": os.getpid(),
            "pids": {child.role: child.process.pid for child in self._children},
        }
        self._log.info("serving", **{k: v for k, v in facts.items() if k != "type"})
        return orjson.dumps(facts)

    # ---------------------------------------------------------------------------------------------------------- end

    def _ended(self, child: _Child) -> None:
        """A process has ended."""
        asyncio.get_running_loop().remove_reader(child.process.sentinel)
        child.process.join()
        code = child.process.exitcode
        assert code is not None
        self._running.discard(child.role)
        self._codes.append(code)
        if not self._stop.is_set():
            served = all(other.ready for other in self._children)
            self._verdict = ExitCode.BROKEN if served else ExitCode.START_FAILED
            self._log.critical("process_ended", role=child.role, pid=child.process.pid, code=code)
            self._stop.set()
        self._changed.set()

    def _end_hung(self, role: str, why: str) -> None:
        """An engine process says nothing and does not end: it is not waited for, and the others drain."""
        for child in self._children:
            if child.role == role and role in self._running:
                self._log.error("process_killed", role=role, pid=child.process.pid, reason=why)
                child.process.kill()

    async def _end(self) -> int:
        """Front ends first: they answer with the engine's vectors to the last."""
        shutdown = self._config.shutdown
        limit_s = START_END_S
        if all(child.ready for child in self._children):
            limit_s = (shutdown.settle_ms + shutdown.grace_ms + shutdown.telemetry_flush_ms) / 1000 + END_MARGIN_S
        front_ends = {child.role for child in self._children if not child.engine}
        engines = {child.role for child in self._children if child.engine}
        self._tell(engines, DRAIN)  # a probe of the one operations port is told at once
        self._tell(front_ends, STOP)
        await self._await_end(front_ends, limit_s)
        self._tell(engines, STOP)
        await self._await_end(engines, limit_s)
        if self._verdict is not None:
            return self._verdict
        if any(code not in (ExitCode.OK, ExitCode.GRACE_EXCEEDED) for code in self._codes):
            return ExitCode.BROKEN
        return max(self._codes, default=ExitCode.OK)

    def _tell(self, roles: set[str], word: bytes) -> None:
        for child in self._children:
            if child.role in roles & self._running:
                with contextlib.suppress(OSError):  # it is ending already
                    child.control.send(word)

    async def _await_end(self, roles: set[str], limit_s: float) -> None:
        try:
            async with asyncio.timeout(limit_s):
                await self._until(lambda: not roles & self._running)
        except TimeoutError:
            for child in self._children:
                if child.role in roles & self._running:
                    self._log.error("process_killed", role=child.role, pid=child.process.pid)
                    child.process.kill()
            await self._until(lambda: not roles & self._running)

    async def _until(self, condition: Callable[[], bool]) -> None:
        waiter = asyncio.ensure_future(self._stop.wait())
        try:
            while not condition():
                self._changed.clear()
                change = asyncio.ensure_future(self._changed.wait())
                waits = {change} if waiter.done() else {change, waiter}
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                change.cancel()
        finally:
            waiter.cancel()

    def _take_stop(self) -> None:
        self._stop.set()
        self._changed.set()

    def _stop_at_once(self, number: signal.Signals) -> None:
        self._log.warning("stopped_at_once", signal=number.name)
        for child in self._children:
            if child.role in self._running:
                child.process.kill()
        os._exit(128 + number)


class _Ends:
    """Sockets and memories between each front end and each engine, until the processes have them."""

    def __init__(self, front_ends: Sequence[str], engines: Sequence[str], memory: int) -> None:
        self._descriptors: list[int] = []
        self.of_front_end: dict[str, list[tuple[str, Descriptor, Descriptor]]] = {name: [] for name in front_ends}
        self.of_engine: dict[str, list[tuple[str, Descriptor, Descriptor]]] = {name: [] for name in engines}
        for front_end, engine in itertools.product(front_ends, engines):
            ours, theirs = socket.socketpair()
            shared = self.keep(create_memory(memory))
            self.of_front_end[front_end].append((engine, self.keep(ours.detach()), shared))
            self.of_engine[engine].append((front_end, self.keep(theirs.detach()), shared))

    def keep(self, descriptor: int) -> Descriptor:
        """One that is closed with the others."""
        self._descriptors.append(descriptor)
        return Descriptor(descriptor)

    def close(self) -> None:
        """So that each end closes with the one process that has it."""
        for descriptor in self._descriptors:
            os.close(descriptor)


def front_end_settings(config: Config, addresses: Sequence[str]) -> Config:
    """``config`` for a front end; its device is only named, to size batches as the engines do."""
    return _changed(
        config,
        server={"address": ",".join(addresses), "so_reuseport": True, "frontends": 1},
        model={"devices": config.model.devices[:1]},
    )


def engine_settings(config: Config, addresses: Sequence[str]) -> dict[str, Config]:
    """``config`` for each engine process, by its name: one a device, and cores dealt out where they compute on them."""
    devices = config.model.devices or (config.model.device,)
    names = [f"engine-{number}" for number in range(len(devices))] if len(devices) > 1 else ["engine"]
    threads: list[int | None] = [config.model.threads] * len(devices)
    if config.model.threads is None and len(devices) > 1:
        cores = core_count()
        threads = [max(1, (cores + number) // len(devices)) for number in range(len(devices))]
    return {
        name: _changed(
            config,
            server={"address": ",".join(addresses), "frontends": 1},
            model={"device": device, "devices": (), "threads": cores},
            tokenizer={"threads": 1},
            shutdown={"settle_ms": 0},
        )
        for name, device, cores in zip(names, devices, threads, strict=True)
    }


def _changed(config: Config, **sections: dict[str, Any]) -> Config:
    """``config`` with some settings of some sections replaced by valid ones."""
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    )


def run_processes(
    config: Config,
    *,
    make_backend: Callable[[Checkpoint], BackendFactory] | None = None,
    checkpoint: Checkpoint | None = None,
) -> int:
    """Live the life of all processes in a new event loop; the exit code."""
    prepare_environment()
    telemetry = config.telemetry
    configure_logs(level=telemetry.log_level, levels=telemetry.log_levels, form=telemetry.log_format)

    supervisor = Supervisor(config, make_backend=make_backend, checkpoint=checkpoint)
    with asyncio.Runner() as runner:
        return runner.run(supervisor.live(partial(write_ready_line, logger="embedserve.supervisor")))
