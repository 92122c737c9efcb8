"""The gate: asks every policy, and tells them what is true now.

Decides the snapshot (what waits, what runs, how long a candidate would take by its fair place) and the order of the
questions: hard limits, the caller's own deadline, then the selected policies; the first refusal counts. Must never know
batches' contents or change the queue.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from embedserve.scheduling.admission import Candidate, LoadState, Policy
from embedserve.scheduling.admission.deadline import DeadlinePolicy
from embedserve.scheduling.admission.queue import QueuePolicy
from embedserve.scheduling.admission.sojourn import OnlineQuantile, SojournWindow
from embedserve.scheduling.cost import CostModel
from embedserve.scheduling.fairness import PriorityClass
from embedserve.scheduling.flight import Flight
from embedserve.scheduling.item import Rejection
from embedserve.scheduling.retry import RetryLadder
from embedserve.scheduling.settings import SchedulerSettings
from embedserve.scheduling.waiting import WaitingQueue

__all__ = ["Gate"]


class Gate:
    """Admission over the parts of one scheduler."""

    __slots__ = (
        "_cost",
        "_flight",
        "_floor_tokens",
        "_hard",
        "_ladder",
        "_lower_share",
        "_max_batch_items",
        "_max_batch_ns",
        "_probe_after_ns",
        "_queue",
        "_selected",
        "_sojourns",
        "_theta",
        "_turn_tokens",
        "policies",
    )

    def __init__(
        self,
        settings: SchedulerSettings,
        policies: Sequence[Policy],
        *,
        queue: WaitingQueue,
        ladder: RetryLadder,
        flight: Flight,
        cost: CostModel,
    ) -> None:
        self._queue = queue
        self._ladder = ladder
        self._flight = flight
        self._cost = cost
        self._turn_tokens = settings.turn_tokens
        self._lower_share = settings.lowest_class_share
        self._max_batch_items = settings.max_batch_items
        self._max_batch_ns = settings.max_batch_ns
        self._floor_tokens = settings.bucket_edges[-1]  # the longest item must always fit
        self._probe_after_ns = settings.probe_after_ns
        self._hard = QueuePolicy(settings)
        self._selected = tuple(policies)
        self.policies: tuple[Policy, ...] = (DeadlinePolicy(settings.pass_overrun_ratio), *policies)
        """In the order in which they are asked, after the hard limits."""
        self._sojourns = SojournWindow(settings.sojourn_window_ns)
        self._theta = OnlineQuantile(settings.wait_quantile, settings.wait_quantile_step)

    @property
    def theta(self) -> float:
        """Online quantile of actual over predicted wait."""
        return self._theta.value

    @property
    def pass_tokens(self) -> int:
        """Computed tokens of a full batch now: by the device's memory, and by the time that a pass may take."""
        return self._cost.batch_tokens(self._max_batch_ns, self._floor_tokens, self._ladder.max_batch_tokens)

    def judge(self, candidate: Candidate, load: LoadState, now_ns: int, *, hard_only: bool = False) -> Rejection | None:
        """The first refusal, or none."""
        refused = self._hard.judge(candidate, load, now_ns)
        if refused is None and not hard_only:
            for policy in self.policies:
                refused = policy.judge(candidate, load, now_ns)
                if refused is not None:
                    break
        return refused

    def opinions(self, candidate: Candidate, now_ns: int) -> tuple[LoadState, Mapping[str, Rejection | None]]:
        """What each policy says to an advisory candidate, and what it is told: for people, who want to see them all."""
        assert candidate.advisory
        load = self.load_state(candidate, now_ns)
        return load, {policy.name: policy.judge(candidate, load, now_ns) for policy in (self._hard, *self.policies)}

    def drain_ns(self, now_ns: int) -> int:
        """Predicted time to work off all that is admitted."""
        queue, ladder = self._queue, self._ladder
        return self._flight.residual_ns(now_ns) + self._cost.drain_ns(
            queue.tokens + ladder.tokens, queue.items + ladder.items, self.pass_tokens, self._max_batch_items
        )

    def load_state(self, candidate: Candidate, now_ns: int) -> LoadState:
        """What the policies are told about a candidate."""
        queue, ladder, cost, flight = self._queue, self._ladder, self._cost, self._flight
        limits = self.pass_tokens, self._max_batch_items
        residual = flight.residual_ns(now_ns)
        items, tokens = queue.items + ladder.items, queue.tokens + ladder.tokens
        old = cost.last_ns is None or now_ns - cost.last_ns > self._probe_after_ns
        theta, rate = self._theta.value, cost.tokens_per_second
        if not items:
            own = wait = residual + cost.drain_ns(candidate.tokens, candidate.items, *limits)
            pass_ns = own - residual
            if residual:
                extra, pass_ns = cost.ride_ns(candidate.tokens, 0, residual, limits[0])
                wait += extra
            return LoadState(
                0, 0, flight.items, flight.tokens, residual, residual, own, wait, theta, rate, old, pass_ns
            )
        drain = residual + cost.drain_ns(tokens, items, *limits)
        fair = self._share(candidate, tokens)
        drain_with = residual + cost.drain_ns(
            fair + candidate.tokens, items * fair // tokens + candidate.items, *limits
        )
        ahead_items, ahead_tokens = self._ahead(candidate, fair, limits[0])
        wait = drain_with
        if ahead_tokens < fair:
            wait = residual + cost.drain_ns(ahead_tokens + candidate.tokens, ahead_items + candidate.items, *limits)
        extra, pass_ns = cost.ride_ns(ahead_tokens + candidate.tokens, tokens - ahead_tokens, wait, limits[0])
        wait += extra
        return LoadState(
            items, tokens, flight.items, flight.tokens, residual, drain, drain_with, wait, theta, rate, old, pass_ns
        )

    def observe_sojourn(self, sojourn_ns: int, now_ns: int, *, timed_out: bool) -> None:
        """A request ended."""
        self._sojourns.add(sojourn_ns, now_ns)
        for policy in self.policies:
            policy.observe_sojourn(sojourn_ns, now_ns, timed_out=timed_out)

    def observe_done(self, wait_ns: int, predicted_ns: int, padded_tokens: int, now_ns: int) -> None:
        """A submission was done so long after it was admitted, in a pass over so many tokens."""
        self._theta.observe(wait_ns / max(predicted_ns, 1))
        if self._selected:
            pass_ns = self._cost.predict_ns(padded_tokens)
            for policy in self._selected:
                policy.observe_wait(wait_ns, pass_ns, now_ns)

    def observe_expired(self, wait_ns: int, predicted_ns: int) -> None:
        """A submission expired after so long: it would have taken longer."""
        ratio = wait_ns / max(predicted_ns, 1)
        if ratio > self._theta.value:
            self._theta.observe(ratio)

    def p95_sojourn_ns(self, now_ns: int) -> int | None:
        """Of the requests that ended lately, timeouts included."""
        return self._sojourns.quantile_ns(0.95, now_ns)

    def figures(self, now_ns: int) -> Mapping[str, Mapping[str, float]]:
        """State of each policy, by name."""
        return {policy.name: policy.figures(now_ns) for policy in (self._hard, *self.policies)}

    def _share(self, candidate: Candidate, tokens: int) -> int:
        """Of so many tokens that wait, those that are before the last of the candidate's tenant, with this candidate.

        Tenants take turns: while it has ``t`` tokens waiting, the others are served no more than ``t`` each. So a
        tenant under its share is not refused because another one fills the queue. Classes above and retries go first;
        each class below has its least share meanwhile, so that nobody is refused for work that comes after him.
        """
        classes = self._queue.classes
        order = classes[candidate.priority]
        first = self._ladder.tokens + sum([klass.tokens for klass in classes[: candidate.priority]])
        below = [klass.tokens for klass in classes[candidate.priority + 1 :] if klass.tokens]
        ahead = self._of_class(candidate, order) + first
        for waiting in below:
            ahead += min(waiting, int(self._lower_share * (ahead + candidate.tokens)))
        return min(tokens, ahead)

    @staticmethod
    def _of_class(candidate: Candidate, order: PriorityClass) -> int:
        """Tokens of its own class that are before it."""
        others = order.tenants.active
        tenant = order.tenant_by_key.get(candidate.tenant)
        own = candidate.tokens
        if tenant is not None and tenant.lanes:
            if others == 1:
                return order.tokens
            others -= 1
            own += tenant.tokens
        return min(order.tokens, own * (others + 1) - candidate.tokens)

    def _ahead(self, candidate: Candidate, share: int, pass_tokens: int) -> tuple[int, int]:
        """Items and tokens that are served before the candidate is done."""
        items, tokens = self._ladder.items, self._ladder.tokens
        for klass in self._queue.classes[: candidate.priority + 1]:
            items += klass.items
            tokens += klass.tokens
        # By fair order nobody gets more than this one does, or one turn, before it is done.
        turn = max(self._turn_tokens(pass_tokens), candidate.tokens)
        fair = min(self._queue.submissions * turn + self._ladder.tokens, share)
        if tokens > fair:
            return items * fair // tokens, fair
        return items, tokens
