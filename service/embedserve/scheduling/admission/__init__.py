"""What an admission policy sees and says.

Decides nothing. A policy judges one candidate against a snapshot in under 20 us and takes nothing; policies combine: a
submission is refused if any of them refuses. Must never know the queue, batches or items.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from embedserve.scheduling.item import Priority, Rejection

__all__ = ["Candidate", "LoadState", "Policy", "retry_after_ms"]


class Candidate:
    """Who asks to be admitted. Tokens are an estimate when ``estimated``.

    A request is judged up to three times: unread (a guess), on an estimate of its tokens, and on their exact number.
    """

    __slots__ = ("advisory", "deadline_ns", "drawn", "estimated", "items", "priority", "tenant", "tokens", "unread")

    def __init__(
        self,
        tokens: int,
        items: int,
        deadline_ns: int | None,
        priority: Priority,
        tenant: str,
        estimated: bool,
        advisory: bool = False,
        *,
        unread: bool = False,
        drawn: bool = False,
    ) -> None:
        self.tokens = tokens
        self.items = items
        self.deadline_ns = deadline_ns
        self.priority = priority
        self.tenant = tenant
        self.estimated = estimated
        self.advisory = advisory
        """Nobody asks to be admitted: the answer teaches nothing, and chance has no part in it."""
        self.unread = unread
        """Nobody has seen the request itself; if it is not refused now it is judged on an estimate next."""
        self.drawn = drawn
        """It was judged unread: where chance has a part, the lot was drawn then."""


class LoadState:
    """Work and predictions at one instant."""

    __slots__ = (
        "drain_ns",
        "drain_with_ns",
        "estimate_is_old",
        "pass_ns",
        "predicted_wait_ns",
        "residual_ns",
        "running_items",
        "running_tokens",
        "theta",
        "tokens_per_second",
        "waiting_items",
        "waiting_tokens",
    )

    def __init__(
        self,
        waiting_items: int,
        waiting_tokens: int,
        running_items: int,
        running_tokens: int,
        residual_ns: int,
        drain_ns: int,
        drain_with_ns: int,
        predicted_wait_ns: int,
        theta: float,
        tokens_per_second: float,
        estimate_is_old: bool,
        pass_ns: int = 0,
    ) -> None:
        self.waiting_items = waiting_items
        self.waiting_tokens = waiting_tokens
        self.running_items = running_items
        self.running_tokens = running_tokens
        self.residual_ns = residual_ns
        """What is left of the passes that run."""
        self.drain_ns = drain_ns
        """Until all that is admitted is done; running passes included."""
        self.drain_with_ns = drain_with_ns
        """The same with the candidate."""
        self.predicted_wait_ns = predicted_wait_ns
        """Until the candidate's last item is done, by its fair place in the queue; before ``theta``."""
        self.theta = theta
        """Online quantile of actual over predicted wait."""
        self.tokens_per_second = tokens_per_second
        self.estimate_is_old = estimate_is_old
        """No pass has ended lately, so the cost model may be wrong."""
        self.pass_ns = pass_ns
        """Of the pass that the candidate's last item is predicted to ride in; part of ``predicted_wait_ns``."""

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs: refusing now cannot make later better."""
        return not self.waiting_items and not self.running_items


class Policy(Protocol):
    """One rule of admission."""

    name: str
    """As in ``Rejection.policy``."""

    def judge(self, candidate: Candidate, load: LoadState, now_ns: int) -> Rejection | None:
        """Refuses or not. Takes nothing, and learns nothing where the candidate is advisory."""

    def observe_sojourn(self, sojourn_ns: int, now_ns: int, *, timed_out: bool) -> None:
        """A request ended after so long, in success or in a timeout."""

    def observe_wait(self, wait_ns: int, pass_ns: int, now_ns: int) -> None:
        """A submission was done so long after it was admitted; its last pass alone takes ``pass_ns``, predicted."""

    def figures(self, now_ns: int) -> Mapping[str, float]:
        """State for metrics: stable names to numbers."""


def retry_after_ms(wait_ns: float) -> int:
    """A wait as whole milliseconds, rounded up, at least 1: 0 would mean a retry storm."""
    return max(1, -(-int(wait_ns) // 1_000_000))
