"""When a batch closes and what goes into it.

Decides: whether a hold is over, which class and bucket lead, how many rows, who fills them. Must never know retries,
admission or outcomes. Hold time is 0 by default: a free worker takes what waits (batch size then follows load by
itself).

Order of buckets inside a class. An *entitled* head is a flow that has not had more than its share (tag <= virtual
time), of a tenant that has not either, or whose turn it is:

1. entitled heads that waited longer than ``max_wait_ns``, the oldest first;
2. entitled heads whose bucket is full, in fair order;
3. fair order; lanes of one flow take turns.

Only the entitled have a claim by age or fullness. A job of 10,000 texts always has old items and full buckets; were
that enough, a single text beside it would wait for the whole job. Never shortest first: that starves long texts.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from embedserve.scheduling.aside import Aside
from embedserve.scheduling.cost import Buckets, CostModel
from embedserve.scheduling.fairness import Flow, PriorityClass, Tenant
from embedserve.scheduling.item import Shape
from embedserve.scheduling.settings import SchedulerSettings
from embedserve.scheduling.waiting import Ticket, WaitingQueue

__all__ = ["BatchPolicy", "Draft"]

LARGE_SHARE = 0.4
"""Part of a full batch that large submissions fill, those that take more than one.

A pass cannot be interrupted, and where two are at work at once the next one is closed before the running one ends: at
most ``scheduling.overlap_ahead_us``, a tenth of ``scheduling.max_batch_ms``, and a quarter of the pass. A small
submission that comes right after that waits for this tenth, for all of the pass that was closed, and for its own, which
they fill up to ``LARGE_SHARE_BESIDE``: 0.1 + 0.4 + 0.2 = 0.7 of the one full batch that it is promised. What is left
is for passes that take longer than predicted, as some do by half on cores that others use too: 0.1 + 1.5 (0.4 + 0.2).
With 0.5 a p99 of 0.95 to 1.04 was measured, with 0.7 of 1.08 to 1.22."""
LARGE_SHARE_BESIDE = 0.2
"""How far they fill up a pass that a small one rides in."""


class Draft:
    """A batch in the making."""

    __slots__ = (
        "due_ns",
        "edge",
        "large_tokens",
        "limit_tokens",
        "parts",
        "room_items",
        "room_tokens",
        "rows",
        "small",
        "tenant",
        "tokens",
    )

    def __init__(self, edge: int, room_items: int, room_tokens: int) -> None:
        self.edge = edge
        """Cost of a row when bucketed; 0 when packed."""
        self.room_items = room_items
        self.room_tokens = room_tokens
        self.limit_tokens = room_tokens
        self.large_tokens = 0
        """Computed tokens of submissions that take several passes."""
        self.small = False
        """Whether it has one that does not."""
        self.parts: dict[int, tuple[Ticket, Sequence[int]]] = {}
        self.rows = 0
        self.tokens = 0
        self.tenant: Tenant | None = None
        """The one in quarantine that it is for alone."""
        self.due_ns: int | None = None
        """The earliest deadline of those in it."""

    def put(self, ticket: Ticket, indexes: Sequence[int], tokens: int, cost: int) -> None:
        """Adds items that follow those of the same submission that are already in it."""
        held = self.parts.get(ticket.id)
        self.parts[ticket.id] = (ticket, indexes if held is None else [*held[1], *indexes])
        self.rows += len(indexes)
        self.tokens += tokens
        self.room_items -= len(indexes)
        self.room_tokens -= cost
        if ticket.large:
            self.large_tokens += cost
        else:
            self.small = True

    @property
    def computed_tokens(self) -> int:
        """Computed tokens so far."""
        return self.rows * self.edge or self.tokens

    @property
    def large_room_tokens(self) -> int:
        """What submissions that take several passes may still have of this one."""
        share = LARGE_SHARE_BESIDE if self.small else LARGE_SHARE
        return min(self.room_tokens, int(self.limit_tokens * share) - self.large_tokens)


class BatchPolicy:
    """Closes batches over a ``WaitingQueue``."""

    __slots__ = ("_batches", "_buckets", "_cost", "_now_ns", "_packed", "_quarantined", "_queue", "_settings")

    SKIPS = 4
    """Heads too long for the rest of a packed batch that are passed over for shorter ones; they lead the next batch."""

    LARGE_SKIPS = 64
    """Large submissions that are passed over once they have had their part: small ones may come after them."""

    def __init__(self, settings: SchedulerSettings, buckets: Buckets, queue: WaitingQueue, cost: CostModel) -> None:
        self._settings = settings
        self._buckets = buckets
        self._queue = queue
        self._cost = cost
        self._packed = settings.shape is Shape.PACKED
        self._batches = 0
        self._now_ns = 0
        self._quarantined = False
        """Whether anybody ever was: nobody pays for what never happened."""

    def hold_ends_ns(self) -> int | None:
        """When what waits now may go at the latest; ``None`` when nothing waits."""
        oldest = self._queue.oldest_ns()
        return None if oldest is None else oldest + self._settings.max_queue_delay_ns

    def is_full(self, max_tokens: int) -> bool:
        """Whether what waits fills a batch, so that no hold applies."""
        queue, max_items = self._queue, self._settings.max_batch_items
        if self._packed:
            return queue.tokens >= max_tokens or queue.items >= max_items
        return any(n >= self._capacity(k, max_tokens) for k, n in enumerate(queue.by_bucket) if n)

    def close(self, now_ns: int, max_tokens: int, *, at_once: bool = False) -> Draft | None:
        """The next batch of first runs, of at most ``max_tokens`` computed tokens; ``None`` while held or empty."""
        queue = self._queue
        if not queue.items:
            return None
        full_only = False
        if self._settings.max_queue_delay_ns and not at_once:
            ends = self.hold_ends_ns()
            if ends is not None and now_ns < ends:
                if not self.is_full(max_tokens):
                    return None
                full_only = not self._packed
        waiting = [klass for klass in queue.classes if klass.items]
        quantum = self._settings.turn_tokens(max_tokens)
        owed = None
        if len(waiting) > 1 and not full_only:
            owed = next((k for k in reversed(waiting[1:]) if k.credit >= min(quantum, k.tokens)), None)
        lead, lane = self._lead(waiting, owed, now_ns, max_tokens, full_only=full_only)
        self._batches += 1
        lead.turn_by_lane[lane] = self._batches
        draft = self._draft(lane, max_tokens)
        self._now_ns = now_ns
        if len(waiting) == 1:
            lead.credit = 0.0
            self._fill(lead, lane, draft, quantum, max_tokens)
        else:
            before = [klass.tokens for klass in waiting]
            if owed is not None:
                self._fill(owed, lane, draft, quantum, quantum)
            for klass in waiting:
                draft.room_tokens = self._fill(klass, lane, draft, quantum, max_tokens)
            self._settle_credit(waiting, before, draft.tokens, quantum)
        assert draft.rows, "work waits and none fits a batch"
        return draft

    def _capacity(self, lane: int, max_tokens: int) -> int:
        """Rows of a full bucketed batch."""
        rows = min(self._settings.max_batch_items, max_tokens // self._buckets.edges[lane])
        sizes = self._settings.batch_sizes
        k = bisect_right(sizes, rows)
        return sizes[k - 1] if k else rows

    def _draft(self, lane: int, max_tokens: int) -> Draft:
        if self._packed:
            return Draft(0, self._settings.max_batch_items, max_tokens)
        edge = self._buckets.edges[lane]
        rows = min(self._queue.by_bucket[lane], self._capacity(lane, max_tokens))
        return Draft(edge, self.captured_rows(rows, edge, max_tokens), max_tokens)

    def captured_rows(self, rows: int, edge: int, max_tokens: int) -> int:
        """How many of ``rows`` waiting rows to run on a device with captured sizes.

        All of them padded up to the next size, or fewer that fill a size while the rest follows in a second pass:
        whichever the cost model finds shorter. Where launches are cheap against padding, down; else up.
        """
        sizes = self._settings.batch_sizes
        if not sizes or rows in sizes or rows < sizes[0]:
            return rows
        down = sizes[bisect_left(sizes, rows) - 1]
        up = self.padded_rows(rows, edge, max_tokens)
        if up == rows:
            return down
        rest = self.padded_rows(rows - down, edge, max_tokens)
        one, two = (
            self._cost.predict_ns(up * edge),
            self._cost.predict_ns(down * edge) + self._cost.predict_ns(rest * edge),
        )
        return rows if one <= two else down

    def padded_rows(self, rows: int, edge: int, max_tokens: int) -> int:
        """The captured size that ``rows`` run at; ``rows`` itself if none fits the limits."""
        sizes = self._settings.batch_sizes
        k = bisect_left(sizes, rows)
        if k == len(sizes) or sizes[k] > self._settings.max_batch_items or sizes[k] * edge > max_tokens:
            return rows
        return sizes[k]

    def _lead(
        self, waiting: list[PriorityClass], owed: PriorityClass | None, now_ns: int, max_tokens: int, *, full_only: bool
    ) -> tuple[PriorityClass, int]:
        """The class and the lane that decide the batch."""
        if self._packed:
            return owed or waiting[0], 0
        if not full_only:
            lead = owed or waiting[0]
            return lead, self._lane(lead, now_ns, max_tokens, range(self._queue.lanes))
        by_bucket = self._queue.by_bucket
        full = [k for k, n in enumerate(by_bucket) if n and n >= self._capacity(k, max_tokens)]
        lead = next(klass for klass in waiting if any(klass.items_by_lane[k] for k in full))
        return lead, self._lane(lead, now_ns, max_tokens, full)

    def _lane(self, klass: PriorityClass, now_ns: int, max_tokens: int, lanes: Sequence[int]) -> int:
        heads = [(lane, *self._head(klass, lane)) for lane in lanes if klass.items_by_lane[lane]]
        late = now_ns - self._settings.max_wait_ns
        vtime = klass.tenants.vtime
        least = min((tenant.tag, tenant.seq) for _, tenant, _ in heads)
        best: tuple[int, ...] = ()
        for lane, tenant, flow in heads:
            rank: tuple[int, ...] = (2, tenant.tag, tenant.seq, flow.tag, flow.seq, klass.turn_by_lane[lane], lane)
            # The tenant whose turn it is may be ahead of virtual time, above all when it is the only one.
            turn = tenant.tag <= vtime or (tenant.tag, tenant.seq) == least
            if turn and flow.tag <= tenant.flows.vtime:
                first = flow.first(lane).ticket
                if first.arrived_ns < late:
                    rank = (0, first.arrived_ns, first.id, klass.turn_by_lane[lane], lane)
                elif klass.items_by_lane[lane] >= self._capacity(lane, max_tokens):
                    rank = (1, *rank[1:])
            if not best or rank < best:
                best = rank
        return best[-1]

    @staticmethod
    def _head(klass: PriorityClass, lane: int) -> tuple[Tenant, Flow]:
        tenant = klass.tenants.head(lane)
        flow = None if tenant is None else tenant.flows.head(lane)
        assert tenant is not None, "items wait in a lane and no tenant owns them"
        assert flow is not None, "items wait in a lane and no flow owns them"
        return tenant, flow

    def _fill(self, klass: PriorityClass, lane: int, draft: Draft, quantum: int, limit: int) -> int:
        """Takes turns of up to ``quantum`` computed tokens in fair order, ``limit`` in all, until the batch is full.

        Returns the room that is left for lower classes.
        """
        order, edge = klass.tenants, draft.edge
        aside = Aside(klass, lane, quantum)
        stop_at = max(draft.room_tokens - limit, 0)
        while draft.room_items > 0 and draft.room_tokens > stop_at and klass.items_by_lane[lane]:
            tenant = order.head(lane)
            if tenant is None or aside.is_passed_over(tenant):
                break
            if self._quarantined and not self._rides(tenant, draft):
                aside.put_tenant(tenant)
                continue
            flow = tenant.flows.head(lane)
            if flow is None:
                assert aside.flows, "a tenant has work in a lane and no flow of it does"
                aside.put_tenant(tenant)  # all it has left here was set aside
                continue
            run = flow.first(lane)
            room = left = draft.room_tokens - stop_at
            large = run.ticket.large
            if large:
                # The first item of a batch always rides, however long it is.
                left = max(min(left, draft.large_room_tokens), 0 if draft.rows else run.first_cost(edge))
            count = run.fit(draft.room_items, left if aside.is_alone(tenant) else min(left, quantum), edge)
            if not count:
                if len(aside.flows) >= (self.LARGE_SKIPS if large else 0 if edge else self.SKIPS):
                    break
                aside.put_flow(tenant, flow, capped=large and run.first_cost(edge) <= room)
                continue
            cost = count * edge or run.sums[run.start + count] - run.sums[run.start]
            # Charged before it is taken: a flow that leaves with its last item takes its lead along.
            tenant.flows.charge(flow, cost)
            order.charge(tenant, cost, in_turn=aside.behind is None)
            indexes, tokens = self._queue.take(run, count)
            draft.put(run.ticket, indexes, tokens, cost)
            due = run.ticket.deadline_ns
            if due is not None and self._queue.items and (draft.due_ns is None or due < draft.due_ns):
                self._cut(draft, due)
        return aside.restore(draft.room_tokens)

    def quarantine(self, tenant: Tenant, now_ns: int) -> None:
        """An item of a tenant was poison: for a while its items ride with nobody else's."""
        tenant.apart_until_ns = now_ns + self._settings.quarantine_ns
        self._quarantined = True

    def _rides(self, tenant: Tenant, draft: Draft) -> bool:
        """Whether a tenant may ride in a batch: nobody beside one in quarantine."""
        apart = tenant.apart_until_ns > self._now_ns
        if not draft.rows:
            draft.tenant = tenant if apart else None
            return True
        return tenant is draft.tenant if apart else draft.tenant is None

    def _cut(self, draft: Draft, due_ns: int) -> None:
        """Leaves no more room than still lets the pass end by the first deadline in it.

        A pass ends for all its riders at once, so that whoever comes last makes all others late. It may take
        ``pass_overrun_ratio`` times its prediction; but it is never cut so short that its fixed cost rules.
        """
        draft.due_ns = due_ns
        left_ns = (due_ns - self._now_ns) / self._settings.pass_overrun_ratio
        limit = max(self._cost.tokens_within(left_ns), self._cost.least_tokens)
        draft.room_tokens = min(draft.room_tokens, int(limit) - draft.computed_tokens)

    def _settle_credit(self, waiting: list[PriorityClass], before: list[int], served: int, quantum: int) -> None:
        """Lower classes that wait on are owed their share of this batch, less what they had of it."""
        share = self._settings.lowest_class_share
        for position, klass in enumerate(waiting):
            if position == 0 or not klass.items:
                klass.credit = 0.0
            else:
                own = before[position] - klass.tokens
                klass.credit = min(max(klass.credit + share * served - own, 0.0), float(quantum))
