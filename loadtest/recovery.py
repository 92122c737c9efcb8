"""How long after a burst a server is well again.

Decides what a window is and when its latency is normal. Must never know a status: the calls that it is given are those
that were answered or expired, since a refusal or a failure at once says nothing of how long one waits.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

__all__ = ["WINDOW_S", "recovery_s", "windowed_p99"]

WINDOW_S: Final = 0.5
"""Short enough to see a queue empty itself; a window of fewer calls is a p99 of few."""
NORMAL: Final = 1.1
"""Latency is normal again at this multiple of the highest windowed p99 before the burst."""


def windowed_p99(calls: npt.NDArray[Any], begin: float, end: float) -> list[tuple[float, float]]:
    """End of each window from ``begin`` to ``end`` in which calls were meant to be sent, and their p99; in seconds.

    ``calls`` has the columns ``meant`` and ``ended``.
    """
    found = []
    for at in np.arange(begin, end - WINDOW_S + 1e-9, WINDOW_S):
        own = calls[(calls["meant"] >= at) & (calls["meant"] < at + WINDOW_S)]
        if len(own):
            found.append((float(at + WINDOW_S), float(np.percentile(own["ended"] - own["meant"], 99))))
    return found


def recovery_s(calls: npt.NDArray[Any], ends: float, stops: float, before_s: float) -> float:
    """Seconds from the end of the burst to that of the last slow window; ``before_s`` is the p99 before it."""
    slow = [at for at, p99 in windowed_p99(calls, ends, stops) if p99 > NORMAL * before_s]
    return max(slow) - ends if slow else 0.0
