"""The scheduler: submissions in, batches out, outcomes in, settlements out.

Decides by putting its parts together; each rule lives in its own file: order in ``fairness``, batches in ``policy``,
failures in ``retry``, admission in ``admission``, who is here in ``ledger``. Must never know a clock, a thread, a task
or a tensor: it is called by one thread, time is an argument, and the same calls give the same answers (I10).

Comments and assertions name the invariants: I1 each item settles exactly once; I2 no batch over its limits; I3 no
queue over its limits; I4 no item in two live batches; I5 nothing dispatched after its deadline; I6 no starvation; I7
nothing cancelled dispatched; I8 work-conserving; I9 a drain ends; I10 deterministic; I11 retries bounded; I12 a suspect
device gets no work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from embedserve.scheduling.admission import Candidate, LoadState, Policy
from embedserve.scheduling.admission.gate import Gate
from embedserve.scheduling.census import Census, take_census, take_depth
from embedserve.scheduling.cost import Buckets, CostModel
from embedserve.scheduling.flight import Flight
from embedserve.scheduling.item import (
    Admitted,
    Batch,
    Depth,
    Fatal,
    Outcome,
    OutOfMemory,
    Priority,
    Rejection,
    Settled,
    Settlement,
    Shape,
    Skipped,
    Slice,
    Submission,
    Succeeded,
    Verdict,
)
from embedserve.scheduling.ledger import Ledger
from embedserve.scheduling.load import Load
from embedserve.scheduling.policy import BatchPolicy
from embedserve.scheduling.retry import Group, Part, RetryLadder
from embedserve.scheduling.settings import SchedulerSettings
from embedserve.scheduling.waiting import Ticket, WaitingQueue

__all__ = ["Load", "Scheduler"]


class Scheduler:
    """One queue for one device. Not thread-safe: called by one thread only."""

    def __init__(self, settings: SchedulerSettings, policies: Sequence[Policy] = ()) -> None:
        self._settings = settings
        self._buckets = Buckets(settings.bucket_edges)
        self._packed = settings.shape is Shape.PACKED
        self.cost = CostModel(
            settings.initial_batch_ns, settings.initial_token_ns, settings.cost_memory, settings.max_batch_tokens
        )
        lanes = 1 if self._packed else len(settings.bucket_edges)
        self._queue = WaitingQueue(self._buckets, lanes, settings.max_tenants)
        self._batching = BatchPolicy(settings, self._buckets, self._queue, self.cost)
        self._ladder = RetryLadder(settings, self._buckets)
        self._flight = Flight()
        self._gate = Gate(
            settings, policies, queue=self._queue, ladder=self._ladder, flight=self._flight, cost=self.cost
        )
        self._ledger = Ledger(self._queue, self._ladder, self._gate)
        self._batch_id = 0
        self.draining = False
        self.fatal: str | None = None
        """Why nothing runs any more."""
        self.suspect: str | None = None
        """Why the device may be broken: nothing runs until the driver has tried it and calls ``acquit`` or ``fail``."""

    # -- admission -----------------------------------------------------------------------------------------------------

    def judge(
        self,
        tokens: int,
        items: int,
        *,
        deadline_ns: int | None = None,
        priority: Priority = Priority.DEFAULT,
        tenant: str = "",
        now_ns: int,
        advisory: bool = False,
        unread: bool = False,
        drawn: bool = False,
    ) -> Rejection | None:
        """Whether so many tokens, by estimate, would be refused now. Takes nothing.

        ``advisory``: teaches nothing. ``unread``: the tokens are a guess, and if it is not refused the request is
        judged on an estimate next. ``drawn``: that is now; it was judged unread before.
        """
        closed = self._closed()
        if closed is not None:
            return closed
        candidate = Candidate(tokens, items, deadline_ns, priority, tenant, True, advisory, unread=unread, drawn=drawn)
        return self._gate.judge(candidate, self._gate.load_state(candidate, now_ns), now_ns)

    def submit(self, submission: Submission, now_ns: int) -> Admitted | Rejection:
        """Takes all items or none.

        A ``continuation`` is judged by the hard limits only, and is taken while draining: its stream was admitted.
        Raises ``ValueError`` for a submission that breaks the contract: no items, an empty item, an id that is in use.
        """
        tokens = submission.tokens
        if not tokens or min(tokens) < 1:
            raise ValueError("a submission has at least one item, and each item at least one token")
        if submission.id in self._ledger.tickets:
            raise ValueError(f"submission {submission.id} is already known")
        closed = self._closed(continuation=submission.continuation)
        if closed is not None:
            return closed
        longest, total, count = max(tokens), sum(tokens), len(tokens)
        if longest > self._buckets.limit:
            figures = {"tokens": float(longest), "max_item_tokens": float(self._buckets.limit)}
            return Rejection("too_large", "ITEM_EXCEEDS_BATCH", None, figures)
        candidate = Candidate(total, count, submission.deadline_ns, submission.priority, submission.tenant, False)
        load = self._gate.load_state(candidate, now_ns)
        refused = self._gate.judge(candidate, load, now_ns, hard_only=submission.continuation or submission.probe)
        if refused is not None:
            return refused
        large = count > 1 and max(total, submission.whole_tokens) > self._gate.pass_tokens
        ticket = Ticket(submission, now_ns, load.predicted_wait_ns, large=large)
        self._queue.add(ticket, submission, total)
        self._ledger.add(ticket)
        assert self._queue.items + self._ladder.items + self._flight.items <= self._settings.max_queue_items, "I3"
        return Admitted(load.predicted_wait_ns)

    def drain(self) -> None:
        """Admits nothing new any more; what was admitted is finished, without holds."""
        self.draining = True

    # -- leaving -------------------------------------------------------------------------------------------------------

    def cancel(self, submission_id: int, now_ns: int) -> int:  # noqa: ARG002
        """The caller is gone: waiting items leave now, running ones are dropped when their batch ends.

        Returns how many waiting items left. None of the items is settled; unknown ids are no error, since a
        cancellation may cross the settlement on its way.
        """
        return self._ledger.cancel(submission_id)

    def expire(self, now_ns: int) -> tuple[Settled, ...]:
        """Settles the waiting items whose deadline has come; a deadline is the first instant that is too late."""
        self._ledger.expire_due(now_ns)
        return self._ledger.take_expired()

    def overdue(self) -> tuple[int, ...]:
        """Submissions whose deadline came, as the last ``expire`` found, while items of theirs run.

        Whoever waits for them may be told, and ``cancel`` then drops what the device still does. Nothing else changes.
        """
        return self._ledger.take_overdue()

    # -- batches -------------------------------------------------------------------------------------------------------

    def next_batch(self, now_ns: int) -> Batch | None:
        """What a free worker runs next; ``None`` when nothing waits, what waits is held, or the device is suspect."""
        if self.fatal is not None or self.suspect is not None:
            return None
        self._ledger.expire_due(now_ns)
        ladder = self._ladder
        if not ladder.items or not ladder.goes_first:
            draft = self._batching.close(now_ns, self._gate.pass_tokens, at_once=self.draining)
            if draft is not None:
                parts: list[Part] = [(ticket, tuple(indexes)) for ticket, indexes in draft.parts.values()]
                return self._dispatch(Group.first(parts, draft.rows), draft.tokens, now_ns)
        group = ladder.pop() if ladder.items else None
        if group is None:
            return None
        tokens = 0
        for ticket, indexes in group.parts:
            own = sum([ticket.tokens[i] for i in indexes])
            tokens += own
            if group.blamed:
                ticket.klass.tenants.surcharge(ticket.tenant, own)
        return self._dispatch(group, tokens, now_ns)

    def complete(self, batch_id: int, outcome: Outcome, now_ns: int) -> Settlement:
        """Takes the outcome of a batch. Raises ``KeyError`` for a batch that does not run: a broken invariant.

        Passes that fail alike again and again make the device ``suspect``: a caller who sends nothing but poison looks
        the same from here, and only a pass over inputs that are known to be good tells them apart.
        """
        if self.fatal is not None:
            return Settlement((), fatal=self.fatal)
        if isinstance(outcome, Fatal):
            return Settlement(self.fail(outcome.why), fatal=outcome.why)
        batch, group, predicted_ns = self._flight.end(batch_id, now_ns)
        self._ladder.spend(group, predicted_ns)
        settled: list[Settled] = []
        before = self._ladder.items
        if isinstance(outcome, Skipped):
            self._skipped(group, settled, now_ns)
            return Settlement(tuple(settled))
        if isinstance(outcome, Succeeded):
            if not all(ticket.probe for ticket, _ in group.parts):  # one cold text now and then is no service rate
                self.cost.learn(batch.tokens, batch.padded_tokens, outcome.elapsed_ns, now_ns)
            alike = self._succeeded(batch, group, outcome, settled, now_ns)
        else:
            alike = self._failed(batch, group, outcome, settled, now_ns)
        if alike and self.suspect is None:
            self.suspect = f"{self._settings.failures_alike_max} passes in a row failed alike"
        return Settlement(tuple(settled), self._ladder.items - before)

    def acquit(self, now_ns: int) -> None:  # noqa: ARG002
        """A pass over known-good inputs went well: the inputs were at fault, and work goes on."""
        self.suspect = None
        self._ladder.end_streak()

    def wake_at(self, now_ns: int) -> int | None:
        """The earliest instant at which an answer changes with no other call; ``None``: sleep until an event."""
        self._ledger.expire_due(now_ns)
        if self._ledger.has_expired:
            return now_ns
        first = self._ledger.first_deadline_ns()
        if self._settings.max_queue_delay_ns and not self.draining and self.fatal is self.suspect is None:
            ends = self._batching.hold_ends_ns()
            if ends is not None and ends > now_ns and (first is None or ends < first):
                return ends
        return first

    def bucket_of(self, tokens: int) -> int:
        """Edge of the bucket that an item of so many tokens joins; the last edge for one that is too long for all."""
        return self._buckets.edge_of(min(tokens, self._buckets.limit))

    # -- figures -------------------------------------------------------------------------------------------------------

    @property
    def depth(self) -> Depth:
        """What waits and what runs."""
        return take_depth(self._queue, self._ladder, self._flight, self._buckets)

    @property
    def waiting(self) -> tuple[int, int]:
        """Items and tokens of ``depth`` that wait, without counting the rest."""
        return self._queue.items + self._ladder.items, self._queue.tokens + self._ladder.tokens

    def census(self, now_ns: int) -> Census:
        """Who waits where, and what failures have left behind: for metrics, in well under 1 ms."""
        return take_census(self._queue, self._ladder, self._buckets.edges, now_ns)

    def load(self, now_ns: int) -> Load:
        """A cheap snapshot for callers and metrics."""
        queued = self._queue.tokens + self._ladder.tokens
        held_items = self._queue.items + self._ladder.items + self._flight.items
        below = (
            held_items < self._settings.max_queue_items
            and queued + self._flight.tokens < self._settings.max_queue_tokens
        )
        return Load(
            queued,
            self._flight.tokens,
            self.cost.tokens_per_second,
            self._gate.drain_ns(now_ns),
            self._gate.p95_sojourn_ns(now_ns),
            below and not self.draining and self.fatal is None,
        )

    @property
    def theta(self) -> float:
        """Online quantile of actual over predicted wait."""
        return self._gate.theta

    @property
    def max_batch_tokens(self) -> int:
        """The effective limit: under the setting after an out-of-memory, and where a pass would take too long."""
        return self._gate.pass_tokens

    def cap_batches(self, tokens: int) -> None:
        """The device has memory for passes of so many tokens, whatever the setting says."""
        self._ladder.cap(tokens)

    def figures(self, now_ns: int) -> Mapping[str, Mapping[str, float]]:
        """State of each policy for metrics, by policy name."""
        return self._gate.figures(now_ns)

    def opinions(self, tokens: int, now_ns: int) -> tuple[LoadState, Mapping[str, Rejection | None]]:
        """What each policy would say to one item of so many tokens, and why; teaches nothing."""
        return self._gate.opinions(Candidate(tokens, 1, None, Priority.DEFAULT, "", True, True), now_ns)

    def observe_sojourn(self, sojourn_ns: int, now_ns: int, *, timed_out: bool) -> None:
        """A request ended so long after it arrived, in success or timeout; refusals and cancellations do not count."""
        self._gate.observe_sojourn(sojourn_ns, now_ns, timed_out=timed_out)

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _closed(self, *, continuation: bool = False) -> Rejection | None:
        if self.fatal is not None:
            return Rejection("draining", "ENGINE_FAILED", None)
        if self.draining and not continuation:
            return Rejection("draining", "DRAINING", None)
        return None

    def _dispatch(self, group: Group, tokens: int, now_ns: int) -> Batch:
        slices: list[Slice] = []
        rows = longest = 0
        oldest = now_ns
        for ticket, indexes in group.parts:
            assert not ticket.cancelled, "I7: a cancelled item was about to run"
            assert ticket.deadline_ns is None or now_ns < ticket.deadline_ns, "I5: an expired item was about to run"
            count, lengths = len(indexes), ticket.tokens
            slices.append(Slice(ticket.id, tuple(indexes)))
            rows += count
            ticket.running += count
            top = lengths[indexes[0]] if count == 1 else max([lengths[i] for i in indexes])
            longest = max(longest, top)
            oldest = min(oldest, ticket.arrived_ns)
        edge, padded = longest, tokens
        if not self._packed:
            edge = self._buckets.edge_of(longest)
            padded = self._batching.padded_rows(rows, edge, self._ladder.max_batch_tokens) * edge
        assert rows <= self._settings.max_batch_items, "I2: too many items in a batch"
        assert padded <= self._settings.max_batch_tokens, "I2: too many tokens in a batch"
        self._batch_id += 1
        batch = Batch(
            self._batch_id, tuple(slices), self._settings.shape, edge, rows, tokens, padded, oldest, group.attempt
        )
        self._flight.start(batch, group, self.cost.predict_ns(padded), now_ns)
        return batch

    def _succeeded(self, batch: Batch, group: Group, outcome: Succeeded, settled: list[Settled], now_ns: int) -> bool:
        bad = outcome.non_finite
        assert all(0 <= row < batch.rows for row in bad), "a row that the batch does not have"
        row = 0
        for ticket, indexes in group.parts:
            count = len(indexes)
            rows = range(row, row + count)
            row += count
            ticket.running -= count
            if not ticket.cancelled:
                good_indexes, good_rows = tuple(indexes), tuple(rows)
                if bad:
                    pairs = [(i, r) for i, r in zip(indexes, rows, strict=True) if r not in bad]
                    good_indexes, good_rows = tuple(i for i, _ in pairs), tuple(r for _, r in pairs)
                    self._rerun(
                        [i for i, r in zip(indexes, rows, strict=True) if r in bad], ticket, group, settled, now_ns
                    )
                if good_indexes:
                    settled.append(Settled(ticket.id, good_indexes, Verdict.DONE, good_rows))
            if self._ledger.release(ticket) and not ticket.cancelled and not ticket.probe:
                wait_ns = now_ns - ticket.submitted_ns
                self._gate.observe_done(wait_ns, ticket.predicted_ns, batch.padded_tokens, now_ns)
        return self._ladder.succeeded(any_finite=len(bad) < batch.rows)

    def _rerun(self, indexes: list[int], ticket: Ticket, group: Group, settled: list[Settled], now_ns: int) -> None:
        """Items whose rows were not finite run again alone, unless they did or it is too late."""
        if indexes and ticket.deadline_ns is not None and ticket.deadline_ns <= now_ns:
            settled.append(Settled(ticket.id, tuple(indexes), Verdict.EXPIRED))
            return
        for i in indexes:
            verdict = self._ladder.non_finite(group, (ticket, (i,)))
            if verdict is not None:
                settled.append(Settled(ticket.id, (i,), verdict))
                self._batching.quarantine(ticket.tenant, now_ns)

    def _failed(self, batch: Batch, group: Group, outcome: Outcome, settled: list[Settled], now_ns: int) -> bool:
        """Those who are still wanted go back to the ladder."""
        parts: list[Part] = []
        for ticket, indexes in group.parts:
            ticket.running -= len(indexes)
            if ticket.cancelled:
                continue
            if ticket.deadline_ns is not None and ticket.deadline_ns <= now_ns:
                settled.append(Settled(ticket.id, tuple(indexes), Verdict.EXPIRED))
            else:
                parts.append((ticket, indexes))
        gone = {ticket.id: ticket for ticket, _ in group.parts}
        group.parts = parts
        memory = isinstance(outcome, OutOfMemory)
        alike = self._ladder.failed("out_of_memory" if memory else "failed")
        if memory:
            self._ladder.lower(batch.padded_tokens)
        if parts:
            verdict = self._ladder.split(group, by_cost=memory)
            if verdict is not None:
                ticket, indexes = parts[0]
                settled.append(Settled(ticket.id, tuple(indexes), verdict))
                if not memory:
                    self._batching.quarantine(ticket.tenant, now_ns)
        for ticket in gone.values():
            self._ledger.release(ticket)
        return alike

    def _skipped(self, group: Group, settled: list[Settled], now_ns: int) -> None:
        """The device passed them over: they are cancelled or too late, every one, and say nothing of the device."""
        for ticket, indexes in group.parts:
            ticket.running -= len(indexes)
            if not ticket.cancelled:
                late = ticket.deadline_ns is not None and ticket.deadline_ns <= now_ns
                assert late, "a wanted batch was skipped"
                settled.append(Settled(ticket.id, tuple(indexes), Verdict.EXPIRED))
            self._ledger.release(ticket)

    def fail(self, why: str) -> tuple[Settled, ...]:
        """Settles everything as ENGINE_FAILED: no item may wait for a device that is gone. Nothing runs any more."""
        self.fatal = why
        running = [part for _, group in self._flight.clear() for part in group.parts]
        retrying = self._ladder.clear()
        lost = self._ledger.clear()
        for ticket, indexes in [*running, *retrying]:
            if not ticket.cancelled:
                lost.setdefault(ticket.id, []).extend(indexes)
        return tuple(Settled(i, tuple(sorted(lost[i])), Verdict.ENGINE_FAILED) for i in sorted(lost))
