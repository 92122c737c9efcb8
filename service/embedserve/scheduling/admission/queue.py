"""Hard limits: how many items and tokens may be admitted and not settled.

Decides by counts only, so that memory is bounded whatever the predictions say; continuations of streams are judged by
this alone. Running items count too: a failed batch comes back, and the limit must hold then as well (I3).
"""

from __future__ import annotations

from collections.abc import Mapping

from embedserve.scheduling.admission import Candidate, LoadState, retry_after_ms
from embedserve.scheduling.item import Rejection
from embedserve.scheduling.settings import SchedulerSettings

__all__ = ["QueuePolicy"]


class QueuePolicy:
    """``max_queue_items`` and ``max_queue_tokens``."""

    name = "queue"

    __slots__ = ("_max_items", "_max_tokens")

    def __init__(self, settings: SchedulerSettings) -> None:
        self._max_items = settings.max_queue_items
        self._max_tokens = settings.max_queue_tokens

    def judge(self, candidate: Candidate, load: LoadState, now_ns: int) -> Rejection | None:  # noqa: ARG002
        """Refuses what does not fit; what never fits is too large, not too early."""
        items = load.waiting_items + load.running_items
        tokens = load.waiting_tokens + load.running_tokens
        if items + candidate.items <= self._max_items and tokens + candidate.tokens <= self._max_tokens:
            return None
        figures = {
            "queued_items": float(items),
            "queued_tokens": float(tokens),
            "items": float(candidate.items),
            "tokens": float(candidate.tokens),
        }
        if candidate.items > self._max_items or candidate.tokens > self._max_tokens:
            return Rejection("too_large", "SUBMISSION_EXCEEDS_QUEUE", None, figures)
        # The part of the backlog that has to go before this one fits; items and tokens drain together.
        over = max(
            (items + candidate.items - self._max_items) / items if items else 0.0,
            (tokens + candidate.tokens - self._max_tokens) / tokens if tokens else 0.0,
        )
        return Rejection("queue", "QUEUE_FULL", retry_after_ms(load.drain_ns * over), figures)

    def observe_sojourn(self, sojourn_ns: int, now_ns: int, *, timed_out: bool) -> None:
        """Counts need no history."""

    def observe_wait(self, wait_ns: int, pass_ns: int, now_ns: int) -> None:
        """Counts need no history."""

    def figures(self, now_ns: int) -> Mapping[str, float]:  # noqa: ARG002
        """The limits."""
        return {"max_queue_items": float(self._max_items), "max_queue_tokens": float(self._max_tokens)}
