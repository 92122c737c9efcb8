"""Lines to a descriptor that may be full: written whole, or dropped and counted, and never waited for.

Decides how long a line may wait for whoever reads the log. Must never know what a line says. A pipe that nobody reads
holds 64 KiB; the next ``write`` would wait for ever, on the event loop, and every call with it. A disk that is full
makes ``write`` raise, in whatever part of the service wants to say something. Neither is a reason to stop serving.

The descriptor is not made non-blocking: that would be so for everybody who shares it, such as the shell. Instead it is
asked whether it has room (poll(2)) before each piece of at most ``PIPE_BUF`` bytes, which then cannot block (pipe(7)).

Lines of which there is one a call may be held for some milliseconds and go out together: asking and writing are two
system calls, 14 us of the event loop's time beside a busy device. They may be made only then, too: code that runs once
among all else that a call needs costs three times what it costs in a row. Lines keep their order.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable
from typing import Final

__all__ = ["Line", "LogStream"]

PATIENCE_MS: Final = 50
"""For a reader that is late: the event loop waits for so long at most..."""
PATIENCE_INTERVAL_S: Final = 1.0
"""... and once in so long, which is a twentieth of its time."""
HELD_BYTES_MAX: Final = 64 << 10
"""Held lines that together are longer go out at once: as much as an empty pipe takes."""
UNMADE_BYTES: Final = 512
"""What a line counts that is not made yet."""

Line = bytes | Callable[[], bytes]
"""A whole line with its newline, or what makes it: in any thread, once, without raising."""


class LogStream:
    """Takes whole lines from any thread. What a file object has of ``write`` and ``flush``, for a logger."""

    def __init__(self, descriptor: int | None, on_loss_over: Callable[[int], None] = lambda _lines: None) -> None:
        """Write to ``descriptor``; ``None``, as where standard error is closed, takes everything and writes nothing.

        ``on_loss_over`` is told how many lines were dropped once a line has passed again; it may log.
        """
        self._descriptor = descriptor
        self._on_loss_over = on_loss_over
        self._poll = select.poll()
        if descriptor is not None:
            self._poll.register(descriptor, select.POLLOUT)
        self._lock = threading.Lock()
        self._patient_from = 0.0
        self._torn = False
        self._held: list[Line] = []
        self._held_bytes = 0
        self._dropped = 0
        self.lines_written = 0
        self.lines_dropped = 0
        """Since the start; ``dropped_lines`` begins anew when a line passes."""

    @property
    def dropped_lines(self) -> int:
        """Lines that were dropped since a line last passed."""
        return self._dropped

    def write(self, line: bytes) -> int:
        """Write ``line``, which ends with a newline, or drop it. Never raises ``OSError``."""
        if self._descriptor is None:
            return len(line)
        with self._lock:
            self._held.append(line)
        self.flush()
        return len(line)

    def hold(self, line: Line) -> bool:
        """Keep ``line`` until ``flush`` or the next ``write``; whether it is the first that is held, so flush soon."""
        if self._descriptor is None:
            return False
        with self._lock:
            first = not self._held
            self._held.append(line)
            self._held_bytes += len(line) if isinstance(line, bytes) else UNMADE_BYTES
            if self._held_bytes < HELD_BYTES_MAX:
                return first
        self.flush()
        return False

    def flush(self) -> None:
        """Write what is held, or drop it. Never raises ``OSError``."""
        if self._descriptor is None or not self._held:
            return
        with self._lock:
            dropped = self._let_go(self._descriptor)
        if dropped:
            self._on_loss_over(dropped)

    def _let_go(self, descriptor: int) -> int:
        """Write all that is held, whole lines together in pieces of ``PIPE_BUF``.

        Returns how many lines were lost before, once lines pass again.
        """
        lines = [line if isinstance(line, bytes) else line() for line in self._held]
        self._held, self._held_bytes = [], 0
        passed = False
        first = size = 0
        for place, line in enumerate(lines):
            if place > first and size + len(line) > select.PIPE_BUF:
                passed = self._count(lines[first:place], descriptor)
                first = place
                size = 0
            size += len(line)
        if lines:
            passed = self._count(lines[first:], descriptor)
        if not passed:
            return 0
        dropped, self._dropped = self._dropped, 0
        return dropped

    def _count(self, lines: list[bytes], descriptor: int) -> bool:
        left = self._unwritten(lines[0] if len(lines) == 1 else b"".join(lines), descriptor)
        lost = 0
        while left > 0:
            lost += 1
            left -= len(lines[-lost])
        self.lines_written += len(lines) - lost
        self._dropped += lost
        self.lines_dropped += lost
        return not lost

    def _unwritten(self, line: bytes, descriptor: int) -> int:
        """Write; how many bytes at its end were not."""
        size = len(line)
        if self._torn:  # the next line must not continue one that broke off
            line = b"\n" + line
        rest = memoryview(line)
        try:
            while rest:
                if not self._has_room():
                    break
                rest = rest[os.write(descriptor, rest[: select.PIPE_BUF]) :]
        except OSError:  # a full disk, or a reader that has gone: counted like a line that found no room
            pass
        if len(rest) < len(line):
            self._torn = bool(rest)
        return min(len(rest), size)

    def _has_room(self) -> bool:
        if self._poll.poll(0):
            return True
        now = time.monotonic()
        if now < self._patient_from:
            return False
        self._patient_from = now + PATIENCE_INTERVAL_S
        return bool(self._poll.poll(PATIENCE_MS))
