"""How late the event loop runs what is due.

Decides when it is measured: only while calls are active, since a timer that ticks for ever would cost an idle server
CPU. Must never know calls: ``RequestTracer`` arms it and says whether it is still wanted.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from embedserve.telemetry.tally import HistogramCell

__all__ = ["LoopLag"]

INTERVAL_S: Final = 0.1
"""Ten samples a second see any stall that a person would notice, at about 10 us each."""


class LoopLag:
    """Arms a timer and records by how much it is late. Event loop only."""

    def __init__(self, cell: HistogramCell, wanted: Callable[[], bool]) -> None:
        """Record into ``cell`` for as long as ``wanted()``."""
        self._cell = cell
        self._wanted = wanted
        self.armed = False

    def arm(self) -> None:
        """Begin, if it is not going on; called where ``armed`` is false."""
        self.armed = True
        self._next(asyncio.get_running_loop())

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.call_later(INTERVAL_S, self._due, loop, time.monotonic() + INTERVAL_S)

    def _due(self, loop: asyncio.AbstractEventLoop, due_s: float) -> None:
        self._cell.observe(max(0.0, time.monotonic() - due_s))
        if self._wanted():
            self._next(loop)
        else:
            self.armed = False
