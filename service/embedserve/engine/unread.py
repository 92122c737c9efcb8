"""Whether a call is refused before anybody reads it.

Decides, while the server refuses, whether a call would be refused however small it is. Must never know a message, a
transport or how a refusal is told.

Under overload most calls are refused, and what each of them costs is taken from those that are served: to receive,
parse and check a message that is thrown away was half of it. So one that comes within ``WATCH_NS`` of a refusal is
judged by its headers first. Its size is not known yet; it is taken for as small as nearly all calls have been lately
(the ``QUANTILE``), so that who has room is read and judged by what it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from embedserve.engine.observer import EngineObserver
from embedserve.engine.stages import Stages
from embedserve.scheduling.admission.sojourn import OnlineQuantile
from embedserve.scheduling.item import Priority, Rejection
from embedserve.scheduling.scheduler import Scheduler

__all__ = ["UnreadAdmission"]

WATCH_NS: Final = 100_000_000
"""So long after a refusal calls are judged unread. A server that sheds refuses many a second; others pay nothing."""
QUANTILE: Final = 0.1
"""Of the sizes of calls, in tokens. A call under it may be refused where it had just fitted; the lowest would be safe
for all, and one odd call would make it useless."""
STEP: Final = 0.05
"""How far one call moves it: down by 4.5 %, up by 0.5 %. A change of sizes is followed within some hundred calls."""


class UnreadAdmission:
    """Judges calls by their headers. Event loop only."""

    def __init__(self, scheduler: Scheduler, observer: EngineObserver, takes: Callable[[], bool]) -> None:
        """``takes``: whether the engine takes calls at all. What it says where it does not is for who reads them."""
        self._scheduler = scheduler
        self._observer = observer
        self._takes = takes
        self._usual: OnlineQuantile | None = None
        self._watched_until_ns = 0

    def watched(self, now_ns: int) -> bool:
        """Whether calls are to be judged unread: one was refused a moment ago."""
        return now_ns < self._watched_until_ns

    def refused(self, now_ns: int) -> None:
        """A call was refused."""
        self._watched_until_ns = now_ns + WATCH_NS

    def saw(self, tokens: int) -> None:
        """A call of about so many tokens was read."""
        if self._usual is None:
            self._usual = OnlineQuantile(QUANTILE, STEP, start=max(tokens, 1.0), low=1.0, high=float(1 << 40))
        else:
            self._usual.observe(tokens)

    def judge(
        self, arrived_ns: int, deadline_ns: int | None, priority: Priority, tenant: str, now_ns: int
    ) -> Rejection | None:
        """What refuses a call that has not been read; ``None``: read it. A refusal has been told to the observer."""
        if self._usual is None or not self._takes() or (deadline_ns is not None and deadline_ns <= now_ns):
            return None
        # A full pass at most: a run of huge calls must not make one that is too large of everybody.
        guess = min(int(self._usual.value), self._scheduler.max_batch_tokens)
        rejection = self._scheduler.judge(
            guess, 1, deadline_ns=deadline_ns, priority=priority, tenant=tenant, now_ns=now_ns, unread=True
        )
        if rejection is None or rejection.policy == "draining":
            return None
        self.refused(now_ns)
        self._observer.rejected(rejection, stage="unread")
        self._observer.request_finished(Stages(arrived_ns), verdict="rejected")
        return rejection
