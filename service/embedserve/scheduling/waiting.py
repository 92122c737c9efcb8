"""The waiting queue: what was admitted and has not been dispatched.

Decides nothing; keeps items as runs (items of one submission in one bucket), so that admission, cancellation and expiry
cost O(buckets) and a count is read, never scanned. Must never know the time, batches in flight or why an item leaves.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence

from embedserve.scheduling.agenda import Agenda
from embedserve.scheduling.cost import Buckets
from embedserve.scheduling.fairness import Flow, PriorityClass, Tenant
from embedserve.scheduling.item import Priority, Submission

__all__ = ["Run", "Ticket", "WaitingQueue"]


class Ticket:
    """An admitted submission, until its last item is settled."""

    __slots__ = (
        "arrived_ns",
        "cancelled",
        "deadline_ns",
        "flow",
        "id",
        "klass",
        "large",
        "predicted_ns",
        "probe",
        "retrying",
        "running",
        "runs",
        "submitted_ns",
        "tenant",
        "tokens",
        "waiting",
    )

    flow: Flow
    tenant: Tenant
    klass: PriorityClass

    def __init__(self, submission: Submission, submitted_ns: int, predicted_ns: int, *, large: bool = False) -> None:
        self.id = submission.id
        self.tokens = submission.tokens
        self.arrived_ns = submission.arrived_ns
        self.submitted_ns = submitted_ns
        self.deadline_ns = submission.deadline_ns
        self.predicted_ns = predicted_ns
        self.probe = submission.probe
        self.runs: list[Run] = []
        self.waiting = 0
        """Items in runs."""
        self.retrying = 0
        """Items that wait to run again."""
        self.running = 0
        self.cancelled = False
        self.large = large
        """It takes several passes: its items leave room in each for those of others."""


class Run:
    """Items of one submission in one lane, dispatched from the front."""

    __slots__ = ("bucket", "indexes", "lane", "start", "sums", "ticket")

    def __init__(self, ticket: Ticket, bucket: int, lane: int, indexes: Sequence[int], sums: list[int]) -> None:
        self.ticket = ticket
        self.bucket = bucket
        """Bucket of all its items; -1 when they are of different ones (packed)."""
        self.lane = lane
        self.indexes = indexes
        self.sums = sums
        """Running sum of tokens, from 0."""
        self.start = 0
        """Items already taken."""

    @property
    def items(self) -> int:
        """Items that still wait."""
        return len(self.indexes) - self.start

    @property
    def tokens(self) -> int:
        """Useful tokens that still wait."""
        return self.sums[-1] - self.sums[self.start]

    def first_cost(self, edge: int) -> int:
        """Computed tokens of the item at the front."""
        return edge or self.sums[self.start + 1] - self.sums[self.start]

    def fit(self, items_max: int, tokens_max: int, edge: int) -> int:
        """How many items from the front fit; each costs ``edge`` tokens, or its own length when edge is 0."""
        left = len(self.indexes) - self.start
        if edge:
            return min(left, items_max, tokens_max // edge)
        sums = self.sums
        if sums[-1] - sums[self.start] <= tokens_max:
            return min(left, items_max)
        return min(items_max, bisect_right(sums, sums[self.start] + tokens_max) - 1 - self.start)


class WaitingQueue:
    """All runs, by class, tenant, flow and lane. With ``lanes`` 1 (packed) a submission is one run."""

    __slots__ = (
        "_arrivals",
        "_buckets",
        "_max_tenants",
        "_tickets",
        "by_bucket",
        "classes",
        "items",
        "lanes",
        "tokens",
        "tokens_by_bucket",
    )

    CROWD = "\0crowd"
    """Where tenants over ``max_tenants`` meet; no metadata value can hold a NUL."""

    def __init__(self, buckets: Buckets, lanes: int, max_tenants: int) -> None:
        assert lanes in (1, len(buckets.edges)), "one lane, or one for each bucket"
        self._buckets = buckets
        self._max_tenants = max_tenants
        self.lanes = lanes
        self.classes = [PriorityClass(lanes) for _ in Priority]
        self.items = 0
        self.tokens = 0
        self.by_bucket = [0] * len(buckets.edges)
        self.tokens_by_bucket = [0] * len(buckets.edges)
        self._tickets: dict[int, Ticket] = {}
        self._arrivals = Agenda(self._tickets.__contains__)

    @property
    def submissions(self) -> int:
        """Submissions with waiting items."""
        return len(self._tickets)

    def oldest_ns(self) -> int | None:
        """Arrival of the submission that has waited longest."""
        return self._arrivals.first_ns()

    def oldest_by_bucket(self, items_max: int) -> list[int | None]:
        """Arrival of what waits longest in each bucket, ``None`` for an empty one. A scan, for metrics.

        After ``items_max`` items it ends: buckets that were not met until then get the last arrival that was seen, and
        are no older than that.
        """
        found: list[int | None] = [None] * len(self.by_bucket)
        missing = {bucket for bucket, items in enumerate(self.by_bucket) if items}
        arrived = None
        ordinal = self._buckets.ordinal
        for ticket in self._tickets.values():  # in the order in which they were admitted
            if not missing or items_max <= 0:
                break
            arrived = ticket.arrived_ns
            for run in ticket.runs:
                left = run.indexes[run.start :][:items_max]
                items_max -= 1 if run.bucket >= 0 else len(left)
                met = {run.bucket} if run.bucket >= 0 else {ordinal[ticket.tokens[i]] for i in left}
                for bucket in met & missing:
                    found[bucket] = arrived
                missing -= met
        for bucket in missing:
            found[bucket] = arrived
        return found

    def add(self, ticket: Ticket, submission: Submission, total: int) -> None:
        """All items of a submission wait; ``total`` is the sum of their tokens."""
        tokens, count = ticket.tokens, len(ticket.tokens)
        klass = self.classes[submission.priority]
        ticket.klass = klass
        self._place(ticket, klass, submission)
        if self.lanes > 1 or count == 1:
            for bucket, indexes, sums in self._buckets.groups(tokens):
                self._push(Run(ticket, bucket, bucket if self.lanes > 1 else 0, indexes, sums))
                self.by_bucket[bucket] += len(indexes)
                self.tokens_by_bucket[bucket] += sums[-1]
        else:
            sums = [0]
            reach = 0
            for t in tokens:
                reach += t
                sums.append(reach)
            self._push(Run(ticket, -1, 0, range(count), sums))
            ordinal, by_bucket, tokens_by_bucket = self._buckets.ordinal, self.by_bucket, self.tokens_by_bucket
            for t in tokens:
                bucket = ordinal[t]
                by_bucket[bucket] += 1
                tokens_by_bucket[bucket] += t
        ticket.waiting = count
        self.items += count
        self.tokens += total
        klass.items += count
        klass.tokens += total
        ticket.tenant.tokens += total
        self._tickets[ticket.id] = ticket
        self._arrivals.add(ticket.arrived_ns, ticket.id)

    def take(self, run: Run, count: int) -> tuple[Sequence[int], int]:
        """Removes ``count`` items from the front of a run: their indexes and their useful tokens."""
        start = run.start
        stop = start + count
        indexes = run.indexes[start:stop]
        tokens = run.sums[stop] - run.sums[start]
        run.start = stop
        self._uncount(run, indexes, tokens)
        if stop == len(run.indexes):
            run.ticket.runs.remove(run)
            self._detach(run)
        return indexes, tokens

    def withdraw(self, ticket: Ticket) -> list[int]:
        """Removes all that still waits of a submission; ascending indexes."""
        gone: list[int] = []
        for run in ticket.runs:
            indexes = run.indexes[run.start :]
            self._uncount(run, indexes, run.tokens)
            self._detach(run)
            gone += indexes
        ticket.runs = []
        assert ticket.waiting == 0, "runs and count of a submission disagree"
        return sorted(gone)

    def _uncount(self, run: Run, indexes: Sequence[int], tokens: int) -> None:
        count, ticket = len(indexes), run.ticket
        klass = ticket.klass
        ticket.waiting -= count
        self.items -= count
        self.tokens -= tokens
        klass.items -= count
        klass.tokens -= tokens
        ticket.tenant.tokens -= tokens
        klass.items_by_lane[run.lane] -= count
        if run.bucket >= 0:
            self.by_bucket[run.bucket] -= count
            self.tokens_by_bucket[run.bucket] -= tokens
        else:
            lengths, ordinal = ticket.tokens, self._buckets.ordinal
            by_bucket, tokens_by_bucket = self.by_bucket, self.tokens_by_bucket
            for i in indexes:
                t = lengths[i]
                bucket = ordinal[t]
                by_bucket[bucket] -= 1
                tokens_by_bucket[bucket] -= t
        if not ticket.waiting:
            del self._tickets[ticket.id]

    def _place(self, ticket: Ticket, klass: PriorityClass, submission: Submission) -> None:
        tenant = klass.tenant_by_key.get(submission.tenant)
        if tenant is None:
            tenant = self._new_tenant(klass, submission.tenant, ticket.id)
        flow = tenant.flow_by_key.get(submission.flow)
        if flow is None:
            flow = tenant.flow_by_key[submission.flow] = Flow(submission.flow, ticket.id, self.lanes)
        ticket.tenant, ticket.flow = tenant, flow

    def _new_tenant(self, klass: PriorityClass, key: str, seq: int) -> Tenant:
        """A tenant's place. Idle ones are kept, since most come again, until there are too many."""
        known = klass.tenant_by_key
        if len(known) >= self._max_tenants:
            if klass.tenants.active < len(known):
                klass.tenant_by_key = known = {k: tenant for k, tenant in known.items() if tenant.lanes}
            if len(known) >= self._max_tenants:
                key = self.CROWD
        tenant = known.get(key)
        if tenant is None:
            tenant = known[key] = Tenant(key, seq, self.lanes)
        return tenant

    def _push(self, run: Run) -> None:
        ticket, lane = run.ticket, run.lane
        flow, tenant, klass = ticket.flow, ticket.tenant, ticket.klass
        ticket.runs.append(run)
        runs = flow.work[lane]
        if runs is None:
            runs = flow.work[lane] = OrderedDict()
        runs[ticket.id] = run
        klass.items_by_lane[lane] += len(run.indexes)
        if len(runs) > 1:
            return
        if not flow.lanes:
            tenant.flows.activate(flow)
        if not tenant.lanes:
            klass.tenants.activate(tenant)
        flow.lanes += 1
        tenant.lanes += 1
        tenant.work[lane] += 1
        tenant.flows.enqueue(flow, lane)
        klass.tenants.enqueue(tenant, lane)

    def _detach(self, run: Run) -> None:
        ticket, lane = run.ticket, run.lane
        flow, tenant, klass = ticket.flow, ticket.tenant, ticket.klass
        runs = flow.work[lane]
        assert runs is not None, "a run left a lane that it was not in"
        del runs[ticket.id]
        if runs:
            return
        flow.lanes -= 1
        tenant.lanes -= 1
        tenant.work[lane] -= 1
        if not flow.lanes:
            tenant.flows.leave(flow)
            del tenant.flow_by_key[flow.key]
        if not tenant.lanes:
            klass.tenants.leave(tenant)
