"""How long the running pass has been at work, and when that is too long.

Decides when a device is stalled (``stall_ns``), well again, or broken (``hang_ns``). Must never know batches, callers
or health: it is told of passes and calls back. The thread that computes cannot be asked: its silence is all there is.

A process that is stopped (SIGSTOP, a debugger, a frozen container, a laptop's lid) wakes up to a monotonic clock that
went on. The pass was stopped with it and needs a moment to end. So the age of a pass is looked at in steps: a step that
comes a whole step late says that nothing ran, and the count begins anew.

One timer at most, and only while a pass runs; it is never moved: a pass costs two assignments.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

__all__ = ["StallLimits", "Timer", "Watchdog"]

STEPS: Final = 4
"""Looks at a pass before it counts as stalled. Fewer would take a shorter freeze for a stall, more would wake more."""
FREEZE_MIN_NS: Final = 100_000_000
"""A timer that is less late than this is an ordinary busy event loop."""
OVERRUN: Final = 4
"""A pass may take so many times what the cost model predicts, where that is longer than ``stall_ns``: a large model on
a small machine is slow, not stalled."""


@dataclass(frozen=True, slots=True)
class StallLimits:
    """``config.Health``'s, in nanoseconds."""

    stall_ns: int = 5_000_000_000
    hang_ns: int = 60_000_000_000


class Timer(Protocol):
    """What ``call_later`` of an event loop returns."""

    def cancel(self) -> None:
        """Do not fire."""


class Watchdog:
    """Watches the pass that the device is at. Lives on the event loop."""

    def __init__(
        self,
        limits: StallLimits,
        *,
        call_later: Callable[[float, Callable[[], None]], Timer],
        on_stall: Callable[[int], None],
        on_recovery: Callable[[int], None],
        on_hang: Callable[[int], None],
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """The callbacks get the age of the pass, or of the stall, in nanoseconds; after ``on_hang`` come no more."""
        self._limits = limits
        self._call_later = call_later
        self._on_stall = on_stall
        self._on_recovery = on_recovery
        self._on_hang = on_hang
        self._clock = clock
        self._step_ns = limits.stall_ns // STEPS
        self._since_ns: int | None = None
        self._extra_ns = 0
        self._timer: Timer | None = None
        self._due_ns = 0
        self._stalled_ns = 0
        self.stalled = False
        """Whether the device is silent for longer than a pass may take."""

    def begun(self, now_ns: int, predicted_ns: int) -> None:
        """The device has turned to a pass that is predicted to take so long."""
        self._since_ns = now_ns
        self._extra_ns = max(0, OVERRUN * predicted_ns - self._limits.stall_ns)
        if self._timer is None:
            self._arm(now_ns)

    def ended(self, now_ns: int) -> None:
        """A pass has ended, well or not: the device answers. ``begun`` follows if it has another one."""
        self._since_ns = None
        if self.stalled:
            self.stalled = False
            self._on_recovery(now_ns - self._stalled_ns)

    def overdue(self, since_ns: int) -> None:
        """Work that should have come back long ago has not even reached the device."""
        if self._since_ns is None:
            self._since_ns, self._extra_ns = since_ns, 0
            now = self._clock()
            self._stall(now)
            if self._timer is None:
                self._arm(now)

    def age_ns(self, now_ns: int) -> int:
        """Of the running pass; 0 while none runs."""
        return 0 if self._since_ns is None else max(0, now_ns - self._since_ns)

    def stop(self) -> None:
        """Watch no longer."""
        self._since_ns = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self, now_ns: int) -> None:
        assert self._since_ns is not None
        limit = self._limits.hang_ns if self.stalled else self._limits.stall_ns
        left_ns = self._since_ns + limit + self._extra_ns - now_ns
        wait_ns = max(min(left_ns, self._step_ns), 1_000_000)
        self._due_ns = now_ns + wait_ns
        self._timer = self._call_later(wait_ns / 1e9, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._since_ns is None:
            return
        now = self._clock()
        if now - self._due_ns > max(self._step_ns, FREEZE_MIN_NS):
            self._since_ns = now
        age = now - self._since_ns
        if age >= self._limits.hang_ns + self._extra_ns:
            self._since_ns = None
            self._on_hang(age)
            return
        if age >= self._limits.stall_ns + self._extra_ns:
            self._stall(now)
        self._arm(now)

    def _stall(self, now_ns: int) -> None:
        if not self.stalled:
            assert self._since_ns is not None
            self.stalled, self._stalled_ns = True, now_ns
            self._on_stall(now_ns - self._since_ns)
