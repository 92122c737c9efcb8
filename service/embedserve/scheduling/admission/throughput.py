"""Backpressure by drain time: what is admitted must be done within ``max_drain_ns`` at the measured service rate.

Decides on (queued + running + this) tokens through the cost model of busy time. coral-gpu-inference divides by a rate
that counts hand-over and idle time and leaves out running work: its rate drifts down when idle and then refuses.
"""

from __future__ import annotations

from collections.abc import Mapping

from embedserve.scheduling.admission import Candidate, LoadState, retry_after_ms
from embedserve.scheduling.item import Rejection
from embedserve.scheduling.settings import ThroughputSettings

__all__ = ["ThroughputPolicy"]


class ThroughputPolicy:
    """Bounds the time to work off all that is admitted."""

    name = "throughput"

    __slots__ = ("_drain_ns", "_settings")

    def __init__(self, settings: ThroughputSettings) -> None:
        self._settings = settings
        self._drain_ns = 0

    def judge(self, candidate: Candidate, load: LoadState, now_ns: int) -> Rejection | None:  # noqa: ARG002
        """Refuses what would drain too late; never on an idle server, which nothing could make readier."""
        limit = self._settings.max_drain_ns
        self._drain_ns = load.drain_ns
        if load.drain_with_ns <= limit or load.idle:
            return None
        own_ns = load.drain_with_ns - load.drain_ns
        # Back when this one fits under 0.8 of the limit; one that is larger than that fits when the server is idle.
        until_ns = load.drain_ns - max(limit * self._settings.resume_fraction - own_ns, 0.0)
        return Rejection(
            "throughput",
            "DRAIN_TIME_EXCEEDED",
            retry_after_ms(until_ns),
            {
                "drain_ns": float(load.drain_with_ns),
                "max_drain_ns": float(limit),
                "tokens": float(candidate.tokens),
                "tokens_per_second": load.tokens_per_second,
            },
        )

    def observe_sojourn(self, sojourn_ns: int, now_ns: int, *, timed_out: bool) -> None:
        """Sojourns do not enter."""

    def observe_wait(self, wait_ns: int, pass_ns: int, now_ns: int) -> None:
        """Waits do not enter."""

    def figures(self, now_ns: int) -> Mapping[str, float]:  # noqa: ARG002
        """The limit and the drain time when last asked."""
        return {"max_drain_ns": float(self._settings.max_drain_ns), "drain_ns": float(self._drain_ns)}
