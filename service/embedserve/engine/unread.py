"""Whether a call is refused before anybody reads it.

Decides, while the server refuses, whether a call would be refused however small it is. Must never know a message, a
transport or how a refusal is told.

Under overload most calls are refused, and what each of them costs is taken from those that are served: to receive,
parse and check a message that is thrown away was half of it. So one that comes within ``WATCH_NS`` of a refusal is
judged by its headers first. Its size is not known yet; it is taken for as small as the smallest call of its class has
been lately, so that who has room is read and judged by what it is.

Of calls of one size that finds all, of calls of many sizes those for whom nothing is left: what is between is read. The
10 % quantile in place of the smallest finds more of those (20 % of the refusals in place of 11 %, texts of 1 to 128
tokens at four times the capacity), and took three of four small calls from a caller beside a flood of large ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from embedserve.engine.observer import EngineObserver
from embedserve.engine.stages import Stages
from embedserve.scheduling.item import Priority, Rejection
from embedserve.scheduling.scheduler import Scheduler

__all__ = ["UnreadAdmission"]

WATCH_NS: Final = 100_000_000
"""So long after a refusal calls are judged unread. A server that sheds refuses many a second; others pay nothing."""
RISE: Final = 1.005
"""What each call adds to the size of the smallest. Who sends one call of 200 is still known by his own when he comes
again, at 2.7 times its size; one odd call beside others of 512 tokens is forgotten after 1,200."""


class UnreadAdmission:
    """Judges calls by their headers. Event loop only."""

    def __init__(self, scheduler: Scheduler, observer: EngineObserver, takes: Callable[[], bool]) -> None:
        """``takes``: whether the engine takes calls at all. What it says where it does not is for who reads them."""
        self._scheduler = scheduler
        self._observer = observer
        self._takes = takes
        self._least = [0.0] * len(Priority)
        """By class, the smallest call lately, in tokens; 0 where none was seen."""
        self._watched_until_ns = 0

    def watched(self, now_ns: int) -> bool:
        """Whether calls are to be judged unread: one was refused a moment ago."""
        return now_ns < self._watched_until_ns

    def refused(self, now_ns: int) -> None:
        """A call was refused."""
        self._watched_until_ns = now_ns + WATCH_NS

    def saw(self, tokens: int, priority: Priority) -> None:
        """A call of about so many tokens was read."""
        least = self._least[priority]
        self._least[priority] = max(min(least * RISE, tokens) if least else tokens, 1.0)

    def judges(self, deadline_ns: int | None, priority: Priority, now_ns: int) -> bool:
        """Whether there is anything to say of a call that has not been read."""
        known = self._least[priority] > 0 and self._takes()
        return known and (deadline_ns is None or now_ns < deadline_ns)

    def judge(
        self, arrived_ns: int, deadline_ns: int | None, priority: Priority, tenant: str, now_ns: int
    ) -> Rejection | None:
        """What refuses a call that has not been read; ``None``: read it. A refusal has been told to the observer.

        Only where ``judges`` says so. Chance has had its part then, and has none in it when the call is read.
        """
        # A full pass at most: a run of huge calls must not make one that is too large of everybody.
        guess = min(int(self._least[priority]), self._scheduler.max_batch_tokens)
        rejection = self._scheduler.judge(
            guess, 1, deadline_ns=deadline_ns, priority=priority, tenant=tenant, now_ns=now_ns, unread=True
        )
        if rejection is None or rejection.policy == "draining":
            return None
        self.refused(now_ns)
        self._observer.rejected(rejection, stage="unread")
        self._observer.request_finished(Stages(arrived_ns), verdict="rejected")
        return rejection
