"""The event loop of a process: made, lived in, and left with an exit code.

Decides which loop runs, what the collector of cycles looks at, and how a process ends whose threads do not. Must never
know what an app is made of.
"""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from embedserve.config import Config
from embedserve.lifecycle import ExitCode, State
from embedserve.telemetry.load import LoadSnapshot
from embedserve.telemetry.logs import configure_logs, flush_lines
from embedserve.wiring import prepare_environment

if TYPE_CHECKING:
    from embedserve.app import App

__all__ = ["read_on_loop", "run_app"]

COLLECTOR_THRESHOLDS: Final = (10_000, 20, 20)
LOAD_READ_S: Final = 2.0
"""A scrape waits for the event loop no longer than this; a loop that is stuck for longer fails the scrape, which says
so."""


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


def read_on_loop(loop: asyncio.AbstractEventLoop, read: Callable[[], LoadSnapshot]) -> LoadSnapshot:
    """Read on the loop's own thread: reading prunes windows, which must not happen beside an append (coral's D15)."""

    async def on_loop() -> LoadSnapshot:
        return read()

    if loop.is_closed():
        return LoadSnapshot(lifecycle_state=State.STOPPED.value)
    return asyncio.run_coroutine_threadsafe(on_loop(), loop).result(LOAD_READ_S)


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
