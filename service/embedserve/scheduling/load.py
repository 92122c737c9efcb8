"""How busy the scheduler is, in the terms of a caller who may send more.

Decides nothing. Must never know policies' thresholds.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Load"]


@dataclass(frozen=True, slots=True)
class Load:
    """What a caller may want to know before sending more."""

    queued_tokens: int
    running_tokens: int
    tokens_per_second: float
    """Useful tokens per second of device time, lately."""
    drain_ns: int
    """Predicted time to work off all that is admitted."""
    p95_sojourn_ns: int | None
    accepting: bool
    """Neither draining nor failed, and below the hard limits."""
