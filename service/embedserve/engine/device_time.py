"""Whose the device's time is when passes overlap.

Decides that no instant counts twice: it belongs to the pass that ended first. So the times of all passes add up to the
time in which the device was busy, and a pass that began beside another one does not look slow. Must never know what a
pass computes.
"""

from __future__ import annotations

from collections import deque
from typing import Final

__all__ = ["DeviceTime"]

ENDED_KEPT: Final = 16
"""Passes that ended lately, of which one that ends now may share the time: no more can have run beside it, since the
engine lets no more than 8 be in flight (``scheduling.batches_in_flight``)."""


class DeviceTime:
    """Not thread-safe."""

    def __init__(self) -> None:
        """Nothing has run."""
        self._ended: deque[tuple[int, int]] = deque(maxlen=ENDED_KEPT)

    def shared_ns(self, begin_ns: int, end_ns: int) -> int:
        """Of a pass that has ended just now: how long passes that ended before it were at work beside it."""
        shared, reach = 0, begin_ns
        for begin, end in sorted(self._ended):
            if end > reach and begin < end_ns:
                shared += min(end, end_ns) - max(begin, reach)
                reach = min(end, end_ns)
        self._ended.append((begin_ns, end_ns))
        return shared
