"""A clock that moves when it is told to.

Decides nothing. Stands where ``time.monotonic_ns`` stands.
"""

from __future__ import annotations

from embedserve.errors import InvariantBroken

__all__ = ["ManualClock"]


class ManualClock:
    """Call it to read it; ``advance`` to move it. Monotonic, like what it stands for."""

    def __init__(self, now_ns: int = 0) -> None:
        """Begin at ``now_ns``."""
        self._now_ns = now_ns

    def __call__(self) -> int:
        """Nanoseconds."""
        return self._now_ns

    def advance(self, *, ns: int = 0, ms: float = 0.0, s: float = 0.0) -> int:
        """Move forward by the sum and return the new reading."""
        step = ns + round(ms * 1e6) + round(s * 1e9)
        if step < 0:
            raise InvariantBroken("a monotonic clock does not go back")
        self._now_ns += step
        return self._now_ns
