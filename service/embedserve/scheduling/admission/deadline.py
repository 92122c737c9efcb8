"""A request that cannot meet its own deadline is refused at once, and so is one that might not. Always on.

Decides by the predicted wait, raised by ``theta`` where predictions have been too short, and a margin: ``PASSES`` of
the passes until then may take ``pass_overrun_ratio`` times their prediction. Serving what comes too late would spend
the device on an answer that nobody waits for (proactive dropping; Clockwork, OSDI 2020, rejects likewise what cannot
meet its SLO). ``theta`` under 1 is not used: a deadline that was met by luck is no promise.

Why the margin: under overload everybody is admitted at the edge of his deadline, so that each pass that takes longer
makes all of them late at once. Without it a quarter of the admitted expired at twice the capacity of a slow device, and
goodput was 70 % (``cpu_2x_1000ms_none`` in the simulation); with it none, and over 95 %. An idle server needs none: it
has no edge, and refusing there would only lose a caller.
"""

from __future__ import annotations

from collections.abc import Mapping

from embedserve.scheduling.admission import Candidate, LoadState, retry_after_ms
from embedserve.scheduling.item import Rejection

__all__ = ["DeadlinePolicy"]


class DeadlinePolicy:
    """Predicted end against the caller's deadline."""

    name = "deadline"

    __slots__ = ("_overrun",)

    PASSES = 2
    """How many of the passes until then may take so much longer than predicted."""

    def __init__(self, pass_overrun_ratio: float = 1.0) -> None:
        self._overrun = pass_overrun_ratio - 1.0

    def judge(self, candidate: Candidate, load: LoadState, now_ns: int) -> Rejection | None:
        """Refuses what would end after its deadline, or might."""
        deadline = candidate.deadline_ns
        if deadline is None:
            return None
        left = deadline - now_ns
        predicted = load.predicted_wait_ns * max(load.theta, 1.0)
        if not load.idle:
            predicted += min(load.predicted_wait_ns, self.PASSES * load.pass_ns) * self._overrun
        if left > 0 and predicted <= left:
            return None
        if left > 0 and load.idle and load.estimate_is_old:
            return None  # a wrong estimate that refuses everybody would never be corrected: let one through
        figures = {"left_ns": float(left), "predicted_ns": float(predicted), "theta": load.theta}
        if left <= 0:
            return Rejection("deadline", "DEADLINE_PASSED", None, figures)
        if load.idle:
            # Not even an empty queue would do, by an estimate that may be out of date: the next probe will tell.
            return Rejection("deadline", "DEADLINE_TOO_SHORT", retry_after_ms(predicted), figures)
        return Rejection(
            "deadline", "DEADLINE_UNREACHABLE", retry_after_ms(min(predicted - left, load.drain_ns)), figures
        )

    def observe_sojourn(self, sojourn_ns: int, now_ns: int, *, timed_out: bool) -> None:
        """The scheduler keeps ``theta``."""

    def observe_wait(self, wait_ns: int, pass_ns: int, now_ns: int) -> None:
        """The scheduler keeps ``theta``."""

    def figures(self, now_ns: int) -> Mapping[str, float]:  # noqa: ARG002
        """Nothing of its own."""
        return {}
