"""What SIGTERM and SIGINT ask of this process: the first one to stop in good order, a later one to end at once.

Decides which is which. Must never know what stopping is. Signals that come together are one wish: ``make`` passes on a
signal that the process has had already as one of make's group, and so do ``timeout`` (1) and shells.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from typing import Final

__all__ = ["TOGETHER_S", "StopSignals"]

TOGETHER_S: Final = 0.5
"""From the first signal. Whoever wants the end at once looks first at what the first one did."""


class StopSignals:
    """The two signals of one process."""

    def __init__(
        self,
        on_first: Callable[[], None],
        on_second: Callable[[signal.Signals], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``on_second`` is told which signal it was, and is expected to end the process."""
        self._on_first = on_first
        self._on_second = on_second
        self._clock = clock
        self._first_s: float | None = None

    def listen(self) -> None:
        """From now on. Only in the main thread's event loop."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.take, number)

    def take(self, number: signal.Signals) -> None:
        """A signal has come."""
        if self._first_s is None:
            self._first_s = self._clock()
            self._on_first()
        elif self._clock() - self._first_s >= TOGETHER_S:
            self._on_second(number)
