"""Waking at an instant, to some tens of microseconds.

Decides how an event loop sleeps until a call is due. The loops' own timers count whole milliseconds (epoll and libuv),
which at 500 calls a second is half of the gap between two of them, and every late call looks like a slow server. Linux
has timerfd, a clock that is a file; elsewhere the loop's timer has to do, and the report says how late calls were.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct
import sys
import time
from typing import Any, Final

__all__ = ["Pacer"]

CLOCK_MONOTONIC: Final = 1
TFD_NONBLOCK: Final = os.O_NONBLOCK if hasattr(os, "O_NONBLOCK") else 0
TFD_TIMER_ABSTIME: Final = 1


class Pacer:
    """One clock of one event loop; for one waiter at a time. ``time.monotonic`` counts."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._due: asyncio.Future[None] | None = None
        self._libc: Any = None
        self._fd = -1
        if sys.platform == "linux":  # os.timerfd_create comes with Python 3.13
            self._libc = ctypes.CDLL(None, use_errno=True)
            self._fd = self._libc.timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK)
            if self._fd < 0:
                raise OSError(ctypes.get_errno(), "timerfd_create failed")
            self._loop.add_reader(self._fd, self._fired)

    async def until(self, instant: float) -> None:
        """Sleep until ``time.monotonic()`` is ``instant``; at once when it has passed."""
        self._due = self._loop.create_future()
        if self._fd < 0:
            self._loop.call_at(self._loop.time() + instant - time.monotonic(), self._fired)
        else:
            seconds, fraction = divmod(max(instant, 1e-9), 1.0)
            # struct itimerspec: no interval, then the instant.
            setting = struct.pack("@qqqq", 0, 0, int(seconds), max(1, int(fraction * 1e9)))
            if self._libc.timerfd_settime(self._fd, TFD_TIMER_ABSTIME, setting, None):
                raise OSError(ctypes.get_errno(), "timerfd_settime failed")
        await self._due

    def close(self) -> None:
        """Give the clock back."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _fired(self) -> None:
        if self._fd >= 0:
            try:
                os.read(self._fd, 8)
            except BlockingIOError:  # set anew between the event and here
                return
        if self._due is not None and not self._due.done():
            self._due.set_result(None)
