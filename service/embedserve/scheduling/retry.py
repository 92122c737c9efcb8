"""What follows a pass that did not end well: split, isolate, give up, fatal.

Decides which items of a failed batch run again, in which company, and how many tokens a batch may hold meanwhile. Must
never know the waiting queue, callers or the time. The ladder:

* out of memory: halves by cost, both run again; the effective ``max_batch_tokens`` falls at once and rises slowly
  (AIMD, Chiu and Jain 1989); a single item is given up as OUT_OF_MEMORY;
* failed: four parts by count, the innocent ones succeed; a single item is ITEM_ERROR;
* rows that are not finite: each runs again alone, once; then NON_FINITE;
* passes that fail alike ``failures_alike_max`` times in a row: the device is suspect.

Why four: one poison item among n costs 2 log2(n) passes either way, but 4/3 n rows instead of 2 n. What failures cost
is bounded twice (``poison_stream`` in the simulation: one caller with 1 % poison at full load): retries of failed
batches get ``retry_share`` of device time while fresh work waits, after a burst that finds one item at once; and the
tokens that run again are charged to their tenant's turns. Whose item was poison rides apart (``policy``).

Groups run breadth first, so that one bad item never fails more than two passes in a row. An item runs again at most
``ceil(log2(rows of its first batch)) + 1`` times (I11): each split halves the count at least; one run alone is last.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from embedserve.scheduling.cost import Buckets
from embedserve.scheduling.item import Shape, Verdict
from embedserve.scheduling.settings import SchedulerSettings
from embedserve.scheduling.waiting import Ticket

__all__ = ["Group", "Part", "RetryLadder"]

Part = tuple[Ticket, Sequence[int]]
"""Items of one submission."""


class Group:
    """Items that run together as one batch."""

    __slots__ = ("alone", "attempt", "blamed", "levels", "parts")

    def __init__(
        self, parts: list[Part], attempt: int, levels: int, *, alone: bool = False, blamed: bool = False
    ) -> None:
        self.parts = parts
        self.blamed = blamed
        """An item in it may be poison; its runs are paid from the budget for retries."""
        self.attempt = attempt
        """Passes that its items have been through."""
        self.levels = levels
        """Splits until every item is alone: ``ceil(log2(rows of the first batch))``."""
        self.alone = alone
        """Its one item runs again because its row was not finite: its last run."""

    @classmethod
    def first(cls, parts: list[Part], rows: int) -> Group:
        """Items that have not run yet."""
        return cls(parts, 0, (rows - 1).bit_length())

    @property
    def rows(self) -> int:
        """Items in it."""
        return sum(len(indexes) for _, indexes in self.parts)


class RetryLadder:
    """Groups that wait to run again, the effective token limit, and the streak of failures."""

    __slots__ = (
        "_buckets",
        "_ceiling_tokens",
        "_credit_ns",
        "_earns",
        "_floor_tokens",
        "_groups",
        "_padded",
        "_settings",
        "_streak",
        "_streak_kind",
        "items",
        "max_batch_tokens",
        "tokens",
    )

    WAYS = 4
    """Parts of a group that failed. One poison item among n then costs 2 log2(n) passes, as with halves, but 4/3 n rows
    instead of 2 n."""

    BURST = 2
    """Passes of device time that are saved up for retries; finding one item takes 4/3 of its pass and some launches."""

    def __init__(self, settings: SchedulerSettings, buckets: Buckets) -> None:
        self._settings = settings
        self._buckets = buckets
        self._padded = settings.shape is Shape.BUCKETED
        self._floor_tokens = buckets.limit  # the longest item that is admitted must always fit
        self._ceiling_tokens = settings.max_batch_tokens
        self._groups: deque[Group] = deque()
        self._streak = 0
        self._streak_kind: str | None = None
        self._credit_ns = 1.0
        self._earns = settings.retry_share / (1 - settings.retry_share)
        self.items = 0
        self.tokens = 0
        self.max_batch_tokens = settings.max_batch_tokens
        """Effective limit: falls on out-of-memory, rises with every good pass."""

    def __bool__(self) -> bool:
        return bool(self._groups)

    @property
    def goes_first(self) -> bool:
        """Whether what runs again goes before what never ran: always, but for blamed groups over their budget."""
        return bool(self._groups) and (self._credit_ns > 0 or not self._groups[0].blamed)

    def spend(self, group: Group, device_ns: int) -> None:
        """A pass took so long. First runs earn ``retry_share`` of device time for retries of failures, which spend it.

        What is saved up ends at the price of finding one item: whoever fails seldom does not wait.
        """
        if group.blamed:
            self._credit_ns -= device_ns
        elif self._credit_ns < self.BURST * device_ns:
            self._credit_ns += device_ns * self._earns

    def lengths(self) -> Iterator[int]:
        """Tokens of each item that waits to run again."""
        return (ticket.tokens[i] for group in self._groups for ticket, indexes in group.parts for i in indexes)

    @property
    def credit_ns(self) -> int:
        """Device time that retries of failures may take now; at 0 and below they wait for those that never failed."""
        return int(self._credit_ns)

    def oldest_ns(self) -> int | None:
        """Arrival of the oldest item that waits to run again."""
        return min((ticket.arrived_ns for group in self._groups for ticket, _ in group.parts), default=None)

    def cost(self, parts: Iterable[Part]) -> int:
        """Computed tokens of a batch of these items."""
        lengths = [ticket.tokens[i] for ticket, indexes in parts for i in indexes]
        return self._buckets.edge_of(max(lengths)) * len(lengths) if self._padded else sum(lengths)

    def pop(self) -> Group | None:
        """The next group, cut to the effective limit without a run; ``None`` when none waits."""
        while self._groups:
            group = self._groups.popleft()
            if group.rows == 1 or self.cost(group.parts) <= self.max_batch_tokens:
                self._count(group.parts, -1)
                return group
            halves = self._halves(group, self._by_cost(group))
            self._groups.extendleft(
                Group(half, group.attempt, group.levels, blamed=group.blamed) for half in reversed(halves)
            )
        return None

    def withdraw(self, ticket: Ticket) -> list[int]:
        """Removes a submission's items that wait to run again; their indexes."""
        gone: list[int] = []
        kept: deque[Group] = deque()
        for group in self._groups:
            own = [part for part in group.parts if part[0] is ticket]
            if own:
                self._count(own, -1)
                gone += [i for _, indexes in own for i in indexes]
                group.parts = [part for part in group.parts if part[0] is not ticket]
            if group.parts:
                kept.append(group)
        self._groups = kept
        return gone

    def clear(self) -> list[Part]:
        """Removes everything; what it was."""
        parts = [part for group in self._groups for part in group.parts]
        self._count(parts, -1)
        self._groups.clear()
        return parts

    def succeeded(self, *, any_finite: bool) -> bool:
        """A pass ended. Returns whether the device is suspect (no row of many passes was finite)."""
        limit = self._ceiling_tokens
        if self.max_batch_tokens < limit:
            self.max_batch_tokens = min(limit, self.max_batch_tokens + self._settings.oom_rise_tokens)
        if any_finite:
            self.end_streak()
            return False
        return self._again("non_finite")

    def failed(self, kind: str) -> bool:
        """A pass failed. Returns whether the device is suspect."""
        return self._again(kind)

    def end_streak(self) -> None:
        """The device works."""
        self._streak, self._streak_kind = 0, None

    def cap(self, tokens: int) -> None:
        """No pass of more was seen to fit the device: the effective limit never rises over it."""
        self._ceiling_tokens = max(self._floor_tokens, min(self._ceiling_tokens, tokens))
        self.max_batch_tokens = min(self.max_batch_tokens, self._ceiling_tokens)

    def lower(self, padded_tokens: int) -> None:
        """A batch of so many computed tokens did not fit the device."""
        cut = int(min(self.max_batch_tokens, padded_tokens) * self._settings.oom_cut)
        self.max_batch_tokens = max(self._floor_tokens, cut)

    def split(self, group: Group, *, by_cost: bool) -> Verdict | None:
        """Queues both halves of a failed group; the verdict if a single item is left."""
        rows = group.rows
        if rows == 1:
            return Verdict.OUT_OF_MEMORY if by_cost else Verdict.ITEM_ERROR
        pieces = [*self._halves(group, self._by_cost(group))] if by_cost else self._pieces(group, rows)
        for piece in pieces:
            self._queue(Group(piece, group.attempt + 1, group.levels, blamed=group.blamed or not by_cost))
        return None

    def non_finite(self, group: Group, part: Part) -> Verdict | None:
        """Queues one item to run alone, once; the verdict if it did."""
        if group.alone:
            return Verdict.NON_FINITE
        self._queue(Group([part], group.attempt + 1, group.levels, alone=True, blamed=True))
        return None

    def _pieces(self, group: Group, rows: int) -> list[list[Part]]:
        """``WAYS`` parts of as equal counts as can be; fewer if there are fewer rows."""
        pieces: list[list[Part]] = []
        rest = group.parts
        for left in range(min(self.WAYS, rows), 1, -1):
            first, rest = self._cut(rest, -(-rows // left))
            pieces.append(first)
            rows -= -(-rows // left)
        return [*pieces, rest]

    def _again(self, kind: str) -> bool:
        self._streak = self._streak + 1 if kind == self._streak_kind else 1
        self._streak_kind = kind
        return self._streak >= self._settings.failures_alike_max

    def _queue(self, group: Group) -> None:
        assert group.attempt <= group.levels + 1, "I11: an item runs again at most ceil(log2(rows)) + 1 times"
        self._count(group.parts, 1)
        self._groups.append(group)

    def _by_cost(self, group: Group) -> int:
        """Where to cut so that both sides cost alike and neither holds more rows than the splits left can part."""
        costs = [ticket.tokens[i] for ticket, indexes in group.parts for i in indexes]
        rows, half = len(costs), sum(costs) / 2
        at, reach = 0, 0
        while at < rows - 1 and reach + costs[at] / 2 <= half:
            reach += costs[at]
            at += 1
        largest = 1 << max(group.levels - group.attempt - 1, 0)
        return min(max(at, 1, rows - largest), rows - 1, max(largest, 1))

    @classmethod
    def _halves(cls, group: Group, at: int) -> tuple[list[Part], list[Part]]:
        """The first ``at`` items and the others."""
        return cls._cut(group.parts, at)

    @staticmethod
    def _cut(parts: list[Part], at: int) -> tuple[list[Part], list[Part]]:
        left: list[Part] = []
        right: list[Part] = []
        for ticket, indexes in parts:
            cut = min(max(at, 0), len(indexes))
            at -= cut
            if cut:
                left.append((ticket, indexes[:cut]))
            if cut < len(indexes):
                right.append((ticket, indexes[cut:]))
        return left, right

    def _count(self, parts: Iterable[Part], sign: int) -> None:
        for ticket, indexes in parts:
            ticket.retrying += sign * len(indexes)
            self.items += sign * len(indexes)
            self.tokens += sign * sum(ticket.tokens[i] for i in indexes)
