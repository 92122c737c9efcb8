"""How the calls in flight end before the process does.

Decides when the port closes, how long is waited and who is cut off. Must never know the engine or why the process ends.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

import grpc.aio
import structlog

from embedserve.api.guard import Guard

__all__ = ["CATCH_UP_MAX_S", "STRAGGLERS_S", "drain_calls"]

CATCH_UP_S: Final = 0.002
"""No call for so long means that gRPC holds none: handing one over takes 0.1 ms."""
CATCH_UP_MAX_S: Final = 0.25
"""Under a load without pauses, this much longer is served and then it must end."""
STRAGGLERS_S: Final = 1.0
"""After the last call has ended: time for one that gRPC has taken and no handler has begun. It needs milliseconds."""


async def drain_calls(server: grpc.aio.Server, guard: Guard, seen: Callable[[], int], grace_ms: int) -> int:
    """Let calls in flight end within the grace; returns how many were cut off. ``seen``: calls that came so far."""
    grace_s = grace_ms / 1000
    await _caught_up(seen)
    stopping = asyncio.ensure_future(server.stop(grace_s))
    cut_off = 0
    try:
        async with asyncio.timeout(grace_s):
            await guard.wait_idle()
    except TimeoutError:
        cut_off = guard.in_flight
        structlog.get_logger("embedserve.app").error("grace_exceeded", cut_off=cut_off, grace_ms=grace_ms)
    # The engine takes calls until the server has none: gRPC may hold one that no handler has seen yet. Streams of
    # reflection have nothing to lose, and must not hold the exit for the whole grace.
    await server.stop(min(grace_s, STRAGGLERS_S))
    await stopping
    return cut_off


async def _caught_up(seen: Callable[[], int]) -> None:
    """Wait for a moment in which gRPC holds no call that no handler has seen: a stop ends those with CANCELLED.

    grpc#41785. There is no such moment under a load that never pauses; then the wait is bounded.
    """
    ends = time.monotonic() + CATCH_UP_MAX_S
    before = -1
    while before != seen() and time.monotonic() < ends:
        before = seen()
        await asyncio.sleep(CATCH_UP_S)
