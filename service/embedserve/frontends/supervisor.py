"""Starts the engine process and the front ends, and ends them in the right order.

Decides who is told to stop when, and what the exit code of all of them together is. Must never know a call. It imports
what a front end does and computes nothing: it is there so that a process that dies, by a signal even, is answered for.

Start: the checkpoint's metadata is read and the port held, once; then all processes start beside each other, and the
ready line is printed when each of them is ready. Stop: the front ends drain, and only when the last of them has ended
the engine process. When any process ends that was not told to, the others drain and the exit code is 70: a front end is
not started anew, because its end is a fault of ours (or of the machine's memory) that an orchestrator must see, and a
deployment that is half itself is harder to reason about than one that restarts.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.context import SpawnProcess
from typing import Any, Final

import orjson
import structlog

from embedserve.config import Config
from embedserve.errors import StartupError
from embedserve.frontends.memory import create_memory
from embedserve.frontends.ports import hold_ports
from embedserve.frontends.processes import DRAIN, STOP, Descriptor, EngineProcess, FrontEndProcess, memory_bytes
from embedserve.lifecycle import ExitCode
from embedserve.model.backend import BackendFactory
from embedserve.model.checkpoint import Checkpoint
from embedserve.ready_line import write_ready_line
from embedserve.telemetry.logs import configure_logs
from embedserve.wiring import prepare_environment, read_checkpoint

__all__ = ["Supervisor", "run_processes"]

ENGINE: Final = "engine"
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
        self._signals = 0
        self._stop = asyncio.Event()
        self._changed = asyncio.Event()
        self._verdict: int | None = None
        """What came before anybody was told to stop."""
        self._codes: list[int] = []

    async def live(self, ready_line: Callable[[bytes], None]) -> int:
        """Start, serve until told to stop or one process ends, and end all."""
        started = time.monotonic_ns()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._take_signal, number)
        try:
            checkpoint = await loop.run_in_executor(None, self._read_checkpoint)
            held, addresses = hold_ports(self._config.server.addresses, shared=self._config.server.so_reuseport)
        except StartupError as error:
            self._log.critical("start_failed", reason=str(error))
            return ExitCode.START_FAILED
        try:
            if not self._stop.is_set():
                self._start(checkpoint, addresses)
            await self._until(lambda: self._stop.is_set() or all(child.ready for child in self._children))
            if not self._stop.is_set():
                ready_line(self._facts(addresses, started))
            await self._stop.wait()
            return await self._end()
        finally:
            for child in self._children:
                if child.role in self._running:
                    child.process.kill()
            for one in held:
                one.close()

    # -------------------------------------------------------------------------------------------------------- start

    def _read_checkpoint(self) -> Checkpoint:
        return self._checkpoint or read_checkpoint(self._config)

    def _start(self, checkpoint: Checkpoint, addresses: tuple[str, ...]) -> None:
        config = self._config
        front_config = _changed(
            config,
            server={"address": ",".join(addresses), "so_reuseport": True, "frontends": 1},
        )
        engine_config = _changed(
            config,
            server={"address": ",".join(addresses), "frontends": 1},
            tokenizer={"threads": 1},
            shutdown={"settle_ms": 0},
        )
        size = memory_bytes(config)
        theirs: list[int] = []
        links = []
        for number in range(config.server.frontends):
            ours, engines = socket.socketpair()
            memory = create_memory(size)
            theirs += [ours.detach(), engines.detach(), memory]
            link, engine_link, shared = (Descriptor(descriptor) for descriptor in theirs[-3:])
            role = f"frontend-{number}"
            links.append((role, engine_link, shared))
            self._spawn(role, lambda control, role=role, link=link, shared=shared: FrontEndProcess(  # type: ignore[misc]
                front_config, checkpoint, role, control, link, shared
            ))  # fmt: skip
        self._spawn(
            ENGINE,
            lambda control: EngineProcess(engine_config, checkpoint, ENGINE, control, links, self._make_backend),
        )
        for descriptor in theirs:  # so that each end closes with the one process that has it
            os.close(descriptor)

    def _spawn(self, role: str, make: Callable[[Descriptor], Callable[[], None]]) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        process = multiprocessing.get_context("spawn").Process(
            target=make(Descriptor(theirs.fileno())), name=f"embedserve-{role}", daemon=False
        )
        process.start()
        theirs.close()
        child = _Child(role, process, ours)
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
        engine = next(child for child in self._children if child.role == ENGINE)
        assert engine.ready is not None
        facts = engine.ready | {
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

    async def _end(self) -> int:
        """Front ends first: they answer with the engine's vectors to the last."""
        shutdown = self._config.shutdown
        limit_s = START_END_S
        if all(child.ready for child in self._children):
            limit_s = (shutdown.settle_ms + shutdown.grace_ms + shutdown.telemetry_flush_ms) / 1000 + END_MARGIN_S
        front_ends = {child.role for child in self._children if child.role != ENGINE}
        self._tell({ENGINE}, DRAIN)  # a probe of the one operations port is told at once
        self._tell(front_ends, STOP)
        await self._await_end(front_ends, limit_s)
        self._tell({ENGINE}, STOP)
        await self._await_end({ENGINE}, limit_s)
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

    def _take_signal(self, number: signal.Signals) -> None:
        self._signals += 1
        if self._signals > 1:
            self._log.warning("stopped_at_once", signal=number.name)
            for child in self._children:
                if child.role in self._running:
                    child.process.kill()
            os._exit(128 + number)
        self._stop.set()
        self._changed.set()


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
